"""The advance primitive: whatever the order of the calls, the cache holds what one pass over the text would give."""

import random

import pytest
import torch

from cognica_poe.modeling.stages_cognica_poe import StageCache
from tests.conftest import make_model

STAGES = 3


@torch.no_grad()
def check(model, cache: StageCache, texts: list[list[int]], tolerance: float = 1e-10) -> None:
    """Every state and every key that the lengths call valid equals that of a fresh pass."""
    fresh = StageCache(model, [torch.tensor(text) for text in texts], cache.capacity)
    fresh.advance(0, STAGES - 1, [True] * len(texts))
    assert cache.known == [len(text) for text in texts]
    for row in range(len(texts)):
        reference, _ = model.boundary_states(torch.tensor([texts[row]]))
        for stage in range(STAGES):
            length = cache.lengths[stage][row]
            assert length <= (cache.lengths[stage - 1][row] if stage else cache.known[row])
            if not length:
                continue
            found = cache.states[stage + 1][row, :length]
            torch.testing.assert_close(found, reference[stage][0, :length], rtol=0, atol=tolerance)
            for layer in model.config.stage_layers(stage):
                for ours, theirs in ((cache.keys, fresh.keys), (cache.values, fresh.values)):
                    torch.testing.assert_close(
                        ours[layer][row, :length], theirs[layer][row, :length], rtol=0, atol=tolerance
                    )


@pytest.mark.parametrize("fixed_width", [None, 4])
@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_any_schedule_leaves_the_state_of_a_fresh_pass(seed, fixed_width):
    model, rng = make_model(short_window=5), random.Random(seed)
    texts = [[rng.randrange(97) for _ in range(rng.randint(1, 30))] for _ in range(rng.choice([1, 3]))]
    cache = StageCache(model, [torch.tensor(text) for text in texts], 60, fixed_width)
    for _ in range(60):
        rows = [rng.random() < 0.8 for _ in texts]
        action = rng.choice(["append", "append", "advance", "advance", "truncate"])
        if action == "append":
            rows = [part and len(text) < 60 for part, text in zip(rows, texts, strict=True)]
            tokens = [rng.randrange(97) for _ in texts]
            cache.append(torch.tensor(tokens), rows)
            texts = [[*text, token] if part else text for text, token, part in zip(texts, tokens, rows, strict=True)]
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


def count_tokens_per_layer(model) -> list[int]:
    """Hook every layer; the list counts the tokens that have passed it."""
    counts = [0] * model.config.num_hidden_layers
    for i, block in enumerate(model.transformer.h):

        def count(module, arguments, i=i):
            counts[i] += arguments[0].shape[1]

        block.register_forward_pre_hook(count)
    return counts


@torch.no_grad()
def test_no_token_passes_a_layer_twice():
    model = make_model()
    counts = count_tokens_per_layer(model)
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


def boundary_states(model, text: torch.Tensor, one_by_one: bool, fixed_width: int | None) -> list[torch.Tensor]:
    """States of a prompt of 40 and of five tokens whose deep stages run one by one, or in one block as drafts do."""
    cache = StageCache(model, [text[0, :40]], 64, fixed_width)
    cache.advance(0, STAGES - 1, [True])
    for token in range(40, 45):
        cache.append(text[:, token], [True])
        cache.advance(0, STAGES - 1 if one_by_one else 0, [True])
    cache.advance(1, STAGES - 1, [True])
    return [states[:, :45] for states in cache.states]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_fixed_width_rounds_a_block_as_single_tokens(dtype):
    model = make_model(dtype=dtype, hidden_size=64, head_dim=16)
    text = torch.randint(0, 97, (1, 60))
    single, block = (boundary_states(model, text, one_by_one, 8) for one_by_one in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(single, block, strict=True))
    if dtype == torch.float32:  # without it the deep stages round differently, so that the test can fail
        single, block = (boundary_states(model, text, one_by_one, None) for one_by_one in (True, False))
        assert not torch.equal(single[-1], block[-1])
