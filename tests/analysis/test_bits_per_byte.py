import itertools
import math

import numpy as np
import pytest
import torch

from cognica_poe.analysis import bits_per_byte, windows
from cognica_poe.analysis.bits_per_byte import measure_paths, score_paths
from cognica_poe.analysis.windows import document_windows
from cognica_poe.modeling.sampling_cognica_poe import combine
from tests.analysis.helpers import BOS, ByteTokenizer, accuracy, bpb, make_texts
from tests.conftest import make_model

TOKENIZER = ByteTokenizer()


def slow_reference(model, texts):
    """One window per forward pass, one position at a time, everything through ``combine`` in fp64."""
    window, alpha = model.config.max_position_embeddings, model.config.poe_alpha
    rows = []  # (document, {path: nats}, {path: correct}, margins, ranges, agrees, direct ranges)
    for index, text in enumerate(texts):
        ids = TOKENIZER.encode(text)
        for start in range(0, len(ids), window):
            part = ids[start : start + window]
            with torch.no_grad():
                stages, plain = model.all_logits(torch.tensor([[BOS, *part[:-1]]]))
            for t, target in enumerate(part):
                logits = [z[0, t].double() for z in stages]
                pools = [combine(logits[: k + 1], alpha) for k in range(len(logits))]
                paths = {f"stage{k}": torch.log_softmax(z, -1) for k, z in enumerate(logits)}
                paths |= {f"prefix{k}": pool for k, pool in enumerate(pools)}
                paths |= {"full": pools[-1], "plain": torch.log_softmax(plain[0, t].double(), -1)}
                best = [pool.topk(2).values for pool in pools]
                rows.append(
                    (
                        index,
                        {name: -float(p[target]) for name, p in paths.items()},
                        {name: int(p.argmax()) == target for name, p in paths.items()},
                        [float(top[0] - top[1]) for top in best[:-1]],
                        [float((b - a).max() - (b - a).min()) for a, b in itertools.pairwise(pools)],
                        [bool(pool.argmax() == pools[-1].argmax()) for pool in pools[:-1]],
                        [float((pools[-1] - pool).max() - (pools[-1] - pool).min()) for pool in pools[:-1]],
                    )
                )
    return rows


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("stage_layers", [[2, 1, 2], [5]])
def test_one_pass_equals_the_slow_reference(alpha, stage_layers):
    model = make_model(poe_alpha=alpha, poe_stage_layers=stage_layers, max_position_embeddings=24)
    texts = make_texts(7)
    rows = slow_reference(model, texts)
    result = measure_paths(model, TOKENIZER, texts, batch_rows=3)
    assert result.tokens == len(rows) == sum(map(len, texts))
    assert result.sums.stages == len(stage_layers)
    for name in rows[0][1]:
        nats = np.bincount([row[0] for row in rows], weights=[row[1][name] for row in rows])
        correct = np.bincount([row[0] for row in rows], weights=[row[2][name] for row in rows])
        np.testing.assert_allclose(result.sums.nats[name], nats, rtol=1e-9)
        np.testing.assert_array_equal(result.sums.correct[name], correct)
    total_bytes = sum(len(text.encode()) for text in texts)
    assert total_bytes > result.tokens  # é counts two bytes
    expected = sum(row[1]["full"] for row in rows) / math.log(2) / total_bytes
    assert bpb(result.sums, "full") == pytest.approx(expected, rel=1e-9)
    assert accuracy(result.sums, "full") == pytest.approx(sum(row[2]["full"] for row in rows) / len(rows))
    positions = result.positions
    assert positions.margin.shape == positions.range.shape == (len(stage_layers) - 1, len(rows))
    np.testing.assert_array_equal(positions.document, [row[0] for row in rows])
    for field, column in (("margin", 3), ("range", 4), ("agrees", 5), ("direct", 6)):
        expected = np.array([row[column] for row in rows]).T.reshape(len(stage_layers) - 1, len(rows))
        np.testing.assert_allclose(getattr(positions, field), expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(positions.full_correct, [row[2]["full"] for row in rows])
    np.testing.assert_array_equal(positions.stage0_correct, [row[2]["stage0"] for row in rows])


def test_measured_paths_in_fp32_match_fp64():
    generator = torch.Generator().manual_seed(1)
    stages = [15 * torch.tanh(2 * torch.randn(40, 300, generator=generator)) for _ in range(4)]
    plain, targets = torch.randn(40, 300, generator=generator), torch.arange(40)
    chunk = score_paths([z.clone() for z in stages], plain, targets, alpha=0.0)
    pool = combine([z.double() for z in stages])
    assert torch.allclose(chunk.nats["full"].double(), -pool[torch.arange(40), targets], atol=2e-5)
    first = combine([z.double() for z in stages[:3]]).topk(2).values
    assert torch.allclose(chunk.margin[2].double(), first[:, 0] - first[:, 1], atol=2e-5)
    assert torch.equal(chunk.correct["full"], pool.argmax(-1) == targets)


@torch.no_grad()
def test_plain_mode_has_one_stage_that_is_the_plain_path():
    model = make_model(poe_mode="none", max_position_embeddings=24)
    texts = make_texts(4)
    result = measure_paths(model, TOKENIZER, texts)
    assert result.sums.stages == 1 and set(result.sums.nats) == {"full", "plain", "stage0", "prefix0"}
    nats = 0.0
    for text in texts:
        ids = TOKENIZER.encode(text)
        for start in range(0, len(ids), 24):
            part = ids[start : start + 24]
            logits = model(input_ids=torch.tensor([[BOS, *part[:-1]]])).logits
            nats -= float(torch.log_softmax(logits[0], -1)[torch.arange(len(part)), part].sum())
    assert result.sums.nats["full"].sum() == pytest.approx(nats)
    assert result.positions.margin.shape == (0, result.tokens)


def test_batching_and_chunks_do_not_change_the_result(monkeypatch):
    model, texts = make_model(max_position_embeddings=16), make_texts(9)
    wide = measure_paths(model, TOKENIZER, texts, batch_rows=32)
    monkeypatch.setattr(bits_per_byte, "_CHUNK_BYTES", 4 * 97 * 5)
    monkeypatch.setattr(windows, "_LOGITS_BYTES", 4 * 97 * 4 * 16 * 2)
    narrow = measure_paths(model, TOKENIZER, texts, batch_rows=32)
    for name, nats in wide.sums.nats.items():
        np.testing.assert_allclose(narrow.sums.nats[name], nats, rtol=1e-12)
    np.testing.assert_allclose(narrow.positions.margin, wide.positions.margin, rtol=1e-9)


def test_windows_score_every_token_once():
    for tokens in range(0, 40):
        for stride in (1, 3, 8):
            windows = list(document_windows(5, tokens, 8, stride))
            scored = [t for item in windows for t in range(item.scored, item.stop)]
            assert scored == list(range(tokens))
            assert all(item.stop - item.start <= 8 and item.scored >= item.start for item in windows)


@torch.no_grad()
def test_overlap_gives_more_context():
    model, texts = make_model(max_position_embeddings=16), make_texts(3, longest=50)
    ids = TOKENIZER.encode(texts[0])
    overlapped = measure_paths(model, TOKENIZER, texts, stride=1)
    assert overlapped.tokens == sum(map(len, texts))
    nats = 0.0
    for t, target in enumerate(ids):
        context = ids[max(0, t - 15) : t]
        pool = model.forward_aggregated(torch.tensor([[BOS, *context]]))[0, -1]
        nats -= float(pool[target])
    assert overlapped.sums.nats["full"][0] == pytest.approx(nats)


def test_kept_positions_stop_at_the_budget_on_a_document_boundary():
    model, texts = make_model(max_position_embeddings=24), make_texts(8)
    sizes = np.cumsum([len(text) for text in texts])
    result = measure_paths(model, TOKENIZER, texts, positions=int(sizes[3]) + 1)
    assert result.positions.document.max() == 3 and len(result.positions.document) == sizes[3]
    least = measure_paths(model, TOKENIZER, ["", "", *texts], positions=0).positions  # two documents with tokens
    assert np.unique(least.document).tolist() == [2, 3]
    assert result.sums.targets.sum() == sizes[-1]


def test_training_flag_and_progress():
    model, lines = make_model(max_position_embeddings=24).train(), []
    measure_paths(model, TOKENIZER, make_texts(3), log=lines.append)
    assert model.training and lines and "tokens" in lines[0]


def test_bad_input_is_refused():
    model = make_model(max_position_embeddings=24)
    with pytest.raises(ValueError, match="stride"):
        measure_paths(model, TOKENIZER, ["abc"], stride=25)
    with pytest.raises(ValueError, match="no token"):
        measure_paths(model, TOKENIZER, ["", ""])

    class Lossy(ByteTokenizer):
        def encode_batch(self, texts):
            return [ids[1:] for ids in super().encode_batch(texts)]

    with pytest.raises(ValueError, match="stand for 2 bytes"):
        measure_paths(model, Lossy(), ["abc", "abcd"])
