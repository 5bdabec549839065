"""The advance primitive: whatever the order of the calls, the cache holds what one pass over the text would give."""

import random

import pytest
import torch

from cognica_poe.modeling.engine_cognica_poe import Engine
from cognica_poe.modeling.stages_cognica_poe import StageCache, slot_count
from tests.conftest import make_model

STAGES = 3


@torch.no_grad()
def check(model, cache: StageCache, texts: list[list[int]], tolerance: float = 1e-10) -> None:
    """Every state and every key that the lengths call valid equals that of a fresh pass."""
    fresh = StageCache(cache.engine, [torch.tensor(text) for text in texts], 60)
    fresh.advance(0, STAGES - 1, [True] * len(texts))
    assert cache.known == [len(text) for text in texts]
    for row in range(len(texts)):
        (_, *reference), _ = model.boundary_states(torch.tensor([texts[row]]))
        for stage in range(STAGES):
            length = cache.lengths[stage][row]
            assert length <= (cache.lengths[stage - 1][row] if stage else cache.known[row])
            if not length:
                continue
            found = cache.states[stage][row, :length]
            torch.testing.assert_close(found, reference[stage][0, :length], rtol=0, atol=tolerance)
            for ours, theirs in ((cache.keys, fresh.keys), (cache.values, fresh.values)):
                for mine, other in zip(ours[stage], theirs[stage], strict=True):
                    torch.testing.assert_close(mine[row, :length], other[row, :length], rtol=0, atol=tolerance)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_any_schedule_leaves_the_state_of_a_fresh_pass(seed, width):
    model, rng = make_model(short_window=5), random.Random(seed)
    texts = [[rng.randrange(97) for _ in range(rng.randint(1, 30))] for _ in range(rng.choice([1, 3]))]
    cache = StageCache(Engine(model, width=width), [torch.tensor(text) for text in texts], 60)
    for _ in range(60):
        rows = [rng.random() < 0.8 for _ in texts]
        action = rng.choice(["append", "append", "advance", "advance", "truncate"])
        if action == "append":
            rows = [part and len(text) < 60 for part, text in zip(rows, texts, strict=True)]
            tokens = [[rng.randrange(97) for _ in range(3)] for _ in texts]
            counts = [min(rng.randint(1, 3), 60 - len(text)) * part for text, part in zip(texts, rows, strict=True)]
            cache.append(torch.tensor(tokens), counts)
            texts = [text + new[:count] for text, new, count in zip(texts, tokens, counts, strict=True)]
        elif action == "advance":
            first = rng.randrange(STAGES)
            cache.advance(first, rng.randrange(first, STAGES), rows)
        else:
            keep = [max(1, len(text) - rng.randrange(4)) for text in texts]
            cache.truncate(keep)
            texts = [text[:length] for text, length in zip(texts, keep, strict=True)]
    check(model, cache, texts)
    cache.advance(0, STAGES - 1, [True] * len(texts))
    assert cache.lengths == [[len(text) for text in texts]] * STAGES
    check(model, cache, texts)


def count_tokens_per_layer(monkeypatch) -> list[int]:
    """The list counts the tokens, unused lanes left out, that have passed every layer of ``make_model()``."""
    counts, run = [0] * 5, StageCache._run

    def counting(cache, stage, starts, used, width, wide):
        for layer in cache.config.stage_layers(stage):
            counts[layer] += sum(used)
        return run(cache, stage, starts, used, width, wide)

    monkeypatch.setattr(StageCache, "_run", counting)
    return counts


@torch.no_grad()
def test_no_token_passes_a_layer_twice(monkeypatch):
    model, counts = make_model(), count_tokens_per_layer(monkeypatch)
    prompt = torch.randint(0, 97, (1, 30))
    model.generate_prefix(prompt, 2, max_new_tokens=11)
    assert counts == [40, 40, 40, 0, 0]
    counts[:] = [0] * 5
    model.generate_stage(prompt, 0, max_new_tokens=11)
    assert counts == [40, 40, 0, 0, 0]
    counts[:] = [0] * 5
    model.generate_wand(prompt, p99_bounds=[0.0, 0.0], max_new_tokens=11)
    assert counts == [40, 40, 0, 0, 0]
    counts[:] = [0] * 5
    model.generate_wand(prompt, p99_bounds=[1.0, 0.5], max_new_tokens=11)
    assert counts[0] == 40 and counts[2] <= 40 and counts[4] <= 40
    counts[:] = [0] * 5
    _, drafts = model.generate_speculative(prompt, k_draft=3, max_new_tokens=11, return_acceptance=True)
    # Every layer sees the prompt, the kept tokens but the last, and the rejected drafts; nothing else.
    assert counts == [40 + drafts["proposed"] - drafts["accepted"]] * 5


def boundary_states(model, text: torch.Tensor, one_by_one: bool, width: int) -> list[torch.Tensor]:
    """States of a prompt of 40 and of nine tokens whose deep stages run one by one, or in blocks as drafts do."""
    cache = StageCache(Engine(model, width=width), [text[0, :40]], 64)
    cache.advance(0, STAGES - 1, [True])
    for token in range(40, 49):
        cache.append(text[:, token : token + 1], [1])
        cache.advance(0, STAGES - 1 if one_by_one else 0, [True])
    cache.advance(1, STAGES - 1, [True])
    return [states[:, :49] for states in cache.states]


@pytest.mark.parametrize("width", [1, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_fixed_width_rounds_a_block_as_single_tokens(dtype, width):
    model = make_model(dtype=dtype, hidden_size=64, head_dim=16)
    text = torch.randint(0, 97, (1, 60))
    single, block = (boundary_states(model, text, one_by_one, width) for one_by_one in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(single, block, strict=True))


@torch.no_grad()
def test_unequal_widths_round_differently():
    # Otherwise the test above could not fail.
    model = make_model(dtype=torch.float32, hidden_size=64, head_dim=16)
    text = torch.randint(0, 97, (1, 60))
    narrow, padded = (boundary_states(model, text, True, width) for width in (1, 8))
    assert not torch.equal(narrow[-1], padded[-1])


def test_few_distinct_buffer_sizes():
    assert [slot_count(n) for n in (1, 64, 65, 300, 512, 513, 2049)] == [64, 64, 128, 512, 512, 768, 2304]
