"""Every keyword of ``forward`` acts or is refused; documents of a row are as alone."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

from tests.conftest import make_model

IDS = torch.tensor([[5, 9, 2, 9, 5, 9], [7, 7, 3, 1, 4, 2]])


def flattened(lengths: list[int], seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Documents, and one row of them with positions that restart."""
    generator = torch.Generator().manual_seed(seed)
    documents = [torch.randint(97, (1, length), generator=generator) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return documents, torch.cat(documents, dim=1), positions


def separately(model, documents: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([model(document, use_cache=False).logits for document in documents], dim=1)


@pytest.mark.parametrize(
    ("attention", "poe_mode"),
    [
        ("sdpa", "flat"),
        ("sdpa", "none"),
        ("eager", "flat"),
        pytest.param("flex_attention", "flat", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_documents_of_a_row_are_as_alone(attention, poe_mode):
    model = make_model(dtype=torch.float32 if attention == "flex_attention" else torch.float64, poe_mode=poe_mode)
    model.set_attn_implementation(attention)
    tolerance = {"rtol": 2e-4, "atol": 2e-4} if attention == "flex_attention" else {"rtol": 1e-9, "atol": 1e-9}
    documents, row, positions = flattened([23, 1, 40, 7])
    expected = separately(model, documents)
    torch.testing.assert_close(model(row, position_ids=positions).logits, expected, **tolerance)
    off = (model(row).logits - expected).abs().max()
    assert off > 0.1  # without positions it is one text
    # Rows of other documents, and each with padding at either end.
    others, second, more = flattened([40, 8, 20, 3], seed=1)
    rows, places = torch.cat((row, second)), torch.cat((positions, more))
    wanted = torch.cat((expected, separately(model, others)))
    for mask in (None, torch.ones_like(rows)):
        found = model(rows, position_ids=places, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(found, wanted, **tolerance)
    left, right = (torch.zeros(2, 5, dtype=torch.int64),) * 2
    padded, mask = (torch.cat((left, t, right), dim=1) for t in (rows, torch.ones_like(rows)))
    for fill in (0, 1):
        places_of_padding = torch.full_like(left, fill)
        positions = torch.cat((places_of_padding, places, places_of_padding), dim=1)
        found = model(padded, position_ids=positions, attention_mask=mask, use_cache=False).logits
        assert found.isfinite().all()
        torch.testing.assert_close(found[:, 5:-5], wanted, **tolerance)
    # Training mode, and one row of positions for all.
    same = model.train()(row.expand(2, -1), position_ids=places[:1]).logits
    torch.testing.assert_close(same, expected.expand(2, -1, -1), **tolerance)


@torch.no_grad()
def test_positions_of_one_document_change_no_bit():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model, mask = make_model(dtype=dtype), torch.ones(2, 24, dtype=torch.int64)
        ids = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(0))
        assert torch.equal(model(ids).logits, model(ids, position_ids=torch.arange(24)[None]).logits)
        mask[0, :7] = 0
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)  # as generate() gives them
        expected = model(ids, attention_mask=mask).logits
        assert torch.equal(model(ids, attention_mask=mask, position_ids=positions).logits[0, 7:], expected[0, 7:])


def test_a_flattening_collator_trains_as_single_documents():
    model = make_model()
    documents, _, _ = flattened([9, 14, 30])
    batch = DataCollatorWithFlattening()([{"input_ids": d[0].tolist()} for d in documents])
    loss = model.train()(**batch).loss
    sums = [model(d, labels=d).loss * (d.shape[1] - 1) for d in documents]
    torch.testing.assert_close(loss, sum(sums) / sum(d.shape[1] - 1 for d in documents))
    grads = [torch.autograd.grad(value, model.lm_head.weight)[0] for value in (loss, sum(sums) / (9 + 14 + 30 - 3))]
    torch.testing.assert_close(*grads)


@torch.no_grad()
def test_boundary_states_are_those_of_the_stages():
    model, ids = make_model(), IDS
    output = model(ids, output_hidden_states=True)
    states = output.hidden_states
    assert isinstance(states, tuple) and len(states) == model.config.num_stages + 1
    assert torch.equal(states[0], model.embed(ids))
    for stage, state in enumerate(states[1:]):
        torch.testing.assert_close(model.stage_head(state, stage), model.forward_stage(ids, stage))
    assert model(ids).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 4 and model(ids, output_hidden_states=False).hidden_states is None
    model.config.output_hidden_states = False
    answer = model.generate(ids, max_new_tokens=2, return_dict_in_generate=True, output_hidden_states=True)
    assert [len(step) for step in answer.hidden_states] == [4, 4]


@torch.no_grad()
def test_tuples_instead_of_an_output():
    model = make_model()
    full = model(IDS, labels=IDS, output_hidden_states=True)
    as_tuple = model(IDS, labels=IDS, output_hidden_states=True, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 4
    assert torch.equal(as_tuple[0], full.loss) and torch.equal(as_tuple[1], full.logits)
    assert len(model(IDS, use_cache=False, return_dict=False)) == 1
    model.config.return_dict = False
    assert isinstance(model(IDS), tuple) and not isinstance(model(IDS, return_dict=True), tuple)


REFUSED_KEYWORDS = {
    "atention_mask": (torch.ones_like(IDS), TypeError),
    "token_type_ids": (torch.zeros_like(IDS), TypeError),
    "cu_seq_lens_q": (torch.tensor([0, 6]), TypeError),
    "tokenizer": (object(), TypeError),
    "output_scores": (True, TypeError),
    "output_attentions": (True, ValueError),
    "past_key_values": (object(), ValueError),
    "inputs_embeds": (torch.zeros(2, 6, 48), ValueError),
    "position_ids": (torch.arange(5)[None], ValueError),
    "cache_position": (torch.arange(1, 7), ValueError),
}
NEUTRAL_KEYWORDS = {
    "num_items_in_batch": 10,
    "ignore_index": -100,
    "cache_position": torch.arange(6),
    "position_ids": torch.arange(6)[None],
    "use_cache": False,
    "logits_to_keep": 0,
    "return_dict": True,
    "attention_mask": torch.ones_like(IDS),
}


def test_keywords_of_forward_act_or_are_refused():
    model = make_model()
    for name, (value, kind) in REFUSED_KEYWORDS.items():
        with pytest.raises(kind, match=name):
            model(IDS, **{name: value})
        if name != "position_ids":
            model(IDS, **{name: None})
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True
        model(IDS)
    expected = make_model()(IDS).logits
    for name, value in NEUTRAL_KEYWORDS.items():
        assert torch.equal(make_model()(IDS, **{name: value}).logits, expected), name
    print(f"forward: refused {len(REFUSED_KEYWORDS)}, taken {len(NEUTRAL_KEYWORDS)}")
    loss = make_model()(IDS, labels=IDS, num_items_in_batch=20).loss
    torch.testing.assert_close(loss, make_model()(IDS, labels=IDS).loss * 10 / 20)


def test_documents_and_what_cannot_hold_them():
    model = make_model()
    _, row, positions = flattened([6, 6])
    assert model(row, position_ids=positions).past_key_values is None
    for cached in ({"use_cache": True}, {"past_key_values": model(IDS[:1]).past_key_values}):
        with pytest.raises(ValueError, match="position_ids restart within a row: several documents have no cache"):
            model(row, position_ids=positions, **cached)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2 cannot part documents"):
        model(row, position_ids=positions)
