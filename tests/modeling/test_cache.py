"""The cache of forward() and generate(): what is cached changes no logits, and transformers can drive it."""

import pytest
import torch

from cognica_poe.modeling.cache_cognica_poe import CognicaKVCache
from tests.conftest import make_model


@pytest.fixture(scope="module", params=["flat", "none"])
def model(request):
    return make_model(poe_mode=request.param)


def prompts(rows: int, tokens: int, pads: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    ids, mask = torch.randint(1, 97, (rows, tokens), generator=generator), torch.ones(rows, tokens, dtype=torch.int64)
    for row, pad in enumerate(pads):
        ids[row, :pad], mask[row, :pad] = 0, 0
    return ids, mask


@pytest.mark.parametrize("blocks", [[1] * 90, [40, 1, 1, 20, 3, 25], [90]])
@torch.no_grad()
def test_cached_logits_equal_uncached_ones(model, blocks):
    ids, mask = prompts(3, 90, (0, 13, 61))
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    cache, seen, found = CognicaKVCache(model.config), 0, []
    for block in blocks:
        end = seen + block
        out = model(ids[:, seen:end], attention_mask=mask[:, :end], past_key_values=cache)
        seen = end
        found.append(out.logits)
    assert cache.get_seq_length() == 90
    difference = (torch.cat(found, dim=1) - expected).abs().amax(-1)
    assert difference[mask.bool()].max() < 1e-10


@torch.no_grad()
def test_padding_changes_no_logits(model):
    ids, mask = prompts(2, 80, (0, 50))
    alone = model(ids[1:, 50:]).logits
    padded = model(ids, attention_mask=mask).logits[1:, 50:]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-10)


@torch.no_grad()
def test_right_padding_without_a_mask_keeps_the_text_before_it(model):
    ids, _ = prompts(1, 60)
    padded = torch.cat((ids, torch.zeros(1, 25, dtype=torch.int64)), dim=1)
    torch.testing.assert_close(model(padded).logits[:, :60], model(ids).logits, rtol=0, atol=1e-10)


@torch.no_grad()
def test_forgotten_tokens_leave_no_trace(model):
    ids, _ = prompts(2, 70)
    cache = CognicaKVCache(model.config)
    model(ids[:, :60], past_key_values=cache)
    cache.crop(-25)
    found = model(ids[:, 35:], past_key_values=cache).logits
    torch.testing.assert_close(found, model(ids).logits[:, 35:], rtol=0, atol=1e-10)


@torch.no_grad()
def test_memory_follows_the_text(model):
    cache = CognicaKVCache(model.config)
    model(prompts(1, 10)[0], past_key_values=cache)
    assert cache.layers[0].keys.shape[2] == 64
    model(prompts(1, 100)[0], past_key_values=cache)
    assert cache.layers[0].keys.shape[2] == 128
    with pytest.raises(ValueError, match="longer than the context of 256"):
        model(prompts(1, 147)[0], past_key_values=cache)
    short = CognicaKVCache(model.config, max_length=20)
    with pytest.raises(ValueError, match="30 tokens do not fit a cache of 20"):
        model(prompts(1, 30)[0], past_key_values=short)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
        {"do_sample": True, "num_return_sequences": 3},
    ],
)
def test_generate_gives_the_same_with_and_without_cache(model, options):
    ids, mask = prompts(2, 40, (0, 17))
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        outputs.append(
            model.generate(ids, attention_mask=mask, max_new_tokens=20, pad_token_id=0, use_cache=use_cache, **options)
        )
    assert outputs[0].tolist() == outputs[1].tolist()
    assert outputs[0].shape[1] == 60


def test_generate_continues_a_cache_and_streams(model):
    class Collector:
        def __init__(self):
            self.ids, self.ended = [], False

        def put(self, ids):
            self.ids += ids.flatten().tolist()

        def end(self):
            self.ended = True

    ids, _ = prompts(1, 40)
    collector = Collector()
    first = model.generate(
        ids, max_new_tokens=10, do_sample=False, pad_token_id=0, streamer=collector, return_dict_in_generate=True
    )
    assert collector.ended and collector.ids == first.sequences[0].tolist()
    more = model.generate(
        first.sequences, max_new_tokens=10, do_sample=False, pad_token_id=0, past_key_values=first.past_key_values
    )
    assert more.tolist() == model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0).tolist()


def test_wrong_calls(model):
    ids, _ = prompts(1, 250)
    with pytest.raises(ValueError, match="more than the context of 256"):
        model.generate(ids, max_new_tokens=10, pad_token_id=0)
    with pytest.raises(ValueError, match="token id 97 is outside the vocabulary of 97"):
        model(torch.tensor([[5, 97]]))
    with pytest.raises(ValueError, match="needs input_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 48))
    with pytest.raises(ValueError, match="pass a CognicaKVCache"):
        model(ids, past_key_values=object())
