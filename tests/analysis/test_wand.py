import numpy as np
import pytest
import torch

from cognica_poe.analysis.bits_per_byte import Positions
from cognica_poe.analysis.wand import bounds_of, calibrate, cross_fit, exit_stages
from cognica_poe.errors import UserError
from cognica_poe.modeling.sampling_cognica_poe import combine
from tests.analysis.helpers import BOS, ByteTokenizer, make_texts
from tests.conftest import make_model


def random_positions(count=500, transitions=3, seed=0):
    generator = np.random.default_rng(seed)
    return Positions(
        document=np.sort(generator.integers(0, 9, size=count)),
        margin=generator.exponential(3.0, size=(transitions, count)).astype(np.float32),
        range=generator.exponential(0.5, size=(transitions, count)).astype(np.float32),
        agrees=generator.random((transitions, count)) < 0.9,
        stage0_correct=generator.random(count) < 0.5,
        full_correct=generator.random(count) < 0.5,
        direct=generator.exponential(0.5, size=(transitions, count)).astype(np.float32),
    )


def slow_exit(margins, bounds, safety):
    """The rule of the card, spelled out for one position."""
    for k, margin in enumerate(margins):
        if margin > safety * sum(bounds[j] for j in range(k, len(bounds))):
            return k
    return len(bounds)


@pytest.mark.parametrize("safety", [0.0, 0.7, 1.0, 3.0])
def test_exit_stage_follows_the_rule(safety):
    positions = random_positions()
    bounds = [1.5, 0.9, 0.4]
    expected = [slow_exit(column, bounds, safety) for column in positions.margin.T]
    np.testing.assert_array_equal(exit_stages(positions.margin, bounds, safety), expected)
    if safety:
        assert len(set(expected)) == 4  # every exit occurs


def test_cross_fit_judges_each_half_with_the_other_halfs_bounds():
    positions = random_positions()
    result = cross_fit(positions, safety=1.0)
    even = np.isin(positions.document, np.unique(positions.document)[::2])
    exits, agreed = [], []
    for index in range(len(even)):
        bounds = [np.quantile(row[even != even[index]].astype(float), 0.99) for row in positions.range]
        stage = slow_exit(positions.margin[:, index], bounds, 1.0)
        exits.append(stage)
        agreed.append(stage == 3 or positions.agrees[stage, index])
    assert result.exit_fraction == pytest.approx([exits.count(k) / len(exits) for k in range(4)])
    assert sum(result.exit_fraction) == pytest.approx(1.0)
    assert result.agreement == pytest.approx(np.mean(agreed))
    assert result.bounds == pytest.approx([np.quantile(row.astype(float), 0.99) for row in positions.range])
    assert result.positions == 500


def test_bounds_that_cover_every_range_never_change_the_top_token():
    """Where each remaining range is within its bound, the top-1 token at the exit is the pool's (the card's proof)."""
    generator = torch.Generator().manual_seed(0)
    stages = [3 * torch.randn(1, 400, 30, generator=generator, dtype=torch.float64)]
    for _ in range(2):
        stages.append(stages[-1] + 0.5 * torch.randn(1, 400, 30, generator=generator, dtype=torch.float64))
    pools = [combine(stages[: k + 1])[0] for k in range(3)]
    deltas = [pools[1] - pools[0], pools[2] - pools[1]]
    ranges = np.stack([(delta.amax(-1) - delta.amin(-1)).numpy() for delta in deltas])
    top = [pool.topk(2).values for pool in pools]
    margins = np.stack([(t[:, 0] - t[:, 1]).numpy() for t in top[:2]])
    exits = exit_stages(margins, ranges.max(-1).tolist(), 1.0)
    assert (exits == 0).any() and (exits == 1).any() and (exits == 2).any()
    tokens = np.stack([pool.argmax(-1).numpy() for pool in pools])
    assert (tokens[exits, np.arange(400)] == tokens[2]).all()
    loose = exit_stages(margins, [0.0, 0.0], 1.0)
    assert (tokens[loose, np.arange(400)] != tokens[2]).any()


def test_calibrate_equals_the_obvious_quantile():
    model, tokenizer = make_model(max_position_embeddings=24), ByteTokenizer()
    texts = make_texts(6)
    sizes = np.cumsum([len(text) for text in texts])
    result = calibrate(model, tokenizer, texts, tokens=int(sizes[3]))
    ranges = []
    for text in texts[:4]:
        ids = tokenizer.encode(text)
        for start in range(0, len(ids), 24):
            part = ids[start : start + 24]
            with torch.no_grad():
                pools = [model.forward_aggregated(torch.tensor([[BOS, *part[:-1]]]), k + 1)[0] for k in range(3)]
            deltas = [pools[1] - pools[0], pools[2] - pools[1]]
            ranges.append(torch.stack([d.amax(-1) - d.amin(-1) for d in deltas]))
    expected = torch.cat(ranges, -1).numpy()
    assert result.positions == expected.shape[1] == sizes[3]
    assert result.bounds == pytest.approx(np.quantile(expected, 0.99, axis=-1).tolist(), rel=1e-6)
    assert bounds_of(expected) == pytest.approx(result.bounds, rel=1e-6)


def test_one_stage_has_no_bounds():
    result = calibrate(make_model(poe_stage_layers=[5], max_position_embeddings=24), ByteTokenizer(), make_texts(3))
    assert (result.bounds, result.exit_fraction, result.agreement) == ([], [1.0], 1.0)


def test_bad_input_is_refused():
    with pytest.raises(UserError, match="plain path"):
        calibrate(make_model(poe_mode="none"), ByteTokenizer(), ["ab", "cd"])
    positions = random_positions()
    positions.document[:] = 4
    with pytest.raises(ValueError, match="at least 2 documents"):
        cross_fit(positions)
