import numpy as np
import pytest
import torch

from cognica_poe.analysis.bits_per_byte import measure_paths
from cognica_poe.analysis.own_text import (
    bits,
    difference,
    is_release,
    measure_text,
    other_model,
    other_nats,
    text_slice,
)
from cognica_poe.errors import UserError
from tests.analysis.helpers import ByteTokenizer, bpb, make_texts
from tests.conftest import make_model

TEXTS = make_texts(12, longest=90)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A random model of another kind with a tokenizer of single bytes, as transformers stores them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("gpt2")
    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=32, n_embd=16, n_layer=2, n_head=2))
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


def test_every_path_of_a_text_with_its_interval():
    model, part = make_model(max_position_embeddings=24), text_slice(TEXTS)
    figures, sums = measure_text(model, ByteTokenizer(), part)
    names = ["full", "first 1 stages", "first 2 stages", "stage 0", "stage 1", "stage 2", "plain"]
    assert [item.name for item in figures] == names
    reference = measure_paths(model, ByteTokenizer(), TEXTS).sums
    for item, path in zip(figures, ("full", "prefix0", "prefix1", "stage0", "stage1", "stage2", "plain"), strict=True):
        assert item.bpb == pytest.approx(bpb(reference, path)) and item.low <= item.bpb <= item.high
    assert bits(sums.nats["full"], part, sums).value == figures[0].bpb
    plain, _ = measure_text(make_model(poe_mode="none"), ByteTokenizer(), part)
    assert [item.name for item in plain] == ["full", "plain"] and plain[0].bpb == plain[1].bpb


def test_another_model_is_measured_on_the_same_bytes(gpt2):
    model, tokenizer = other_model(gpt2, torch.device("cpu"))
    found = other_nats(model, tokenizer, TEXTS)
    for text, nats in zip(TEXTS, found, strict=True):
        ids, expected = tokenizer(text)["input_ids"], 0.0
        assert len(ids) == len(text.encode())
        for start in range(0, len(ids), 32):  # one window, one token at a time
            row = [tokenizer.eos_token_id]
            for token in ids[start : start + 32]:
                with torch.no_grad():
                    expected -= float(model(torch.tensor([row])).logits[0, -1].log_softmax(-1)[token])
                row.append(token)
        assert nats == pytest.approx(expected, rel=1e-5)
    part = text_slice(TEXTS)
    _, sums = measure_text(make_model(max_position_embeddings=24), ByteTokenizer(), part)
    paired = difference(sums.nats["full"], found, part, sums)
    expected = (sums.nats["full"].sum() - found.sum()) / np.log(2) / part.bytes
    assert paired.value == pytest.approx(expected) and paired.low <= paired.value <= paired.high


def test_what_cannot_be_compared_is_refused(gpt2, tmp_path):
    model, _ = other_model(gpt2, torch.device("cpu"))
    with pytest.raises(UserError, match="no causal language model can be loaded from"):
        other_model(str(tmp_path), torch.device("cpu"))
    assert not is_release(gpt2)

    class Lossy:
        bos_token_id, eos_token_id = 0, 0

        def __call__(self, text, **options):
            return {"input_ids": [1]}

        def decode(self, ids, **options):
            return "other"

    with pytest.raises(UserError, match="does not give text 0 back"):
        other_nats(model, Lossy(), ["text"])
    Lossy.bos_token_id = Lossy.eos_token_id = None
    with pytest.raises(UserError, match="neither BOS nor EOS"):
        other_nats(model, Lossy(), ["text"])
    with pytest.raises(UserError, match="single short piece"):
        text_slice(["x"])
