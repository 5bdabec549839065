"""The forward pass against its definition, its parameters, and the combiner."""

import math

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cognica_poe.modeling.blocks_cognica_poe import visible_slots
from cognica_poe.modeling.configuration_cognica_poe import CognicaPoEConfig
from cognica_poe.modeling.graphs_cognica_poe import has_compiler
from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM
from cognica_poe.modeling.sampling_cognica_poe import combine
from tests.conftest import make_model
from tests.oracles import forward as naive

SHAPES = {
    "3b": ({}, [16, 6, 5, 5], True, 3_019_900_506),
    "1.5b": (
        {
            "vocab_size": 48_000,
            "hidden_size": 1536,
            "intermediate_size": 6144,
            "num_hidden_layers": 24,
            "num_attention_heads": 12,
            "num_key_value_heads": 6,
        },
        [12, 5, 4, 3],
        True,
        1_507_591_082,
    ),
    "1.3b": (
        {
            "hidden_size": 1536,
            "intermediate_size": 6144,
            "num_hidden_layers": 24,
            "num_attention_heads": 12,
            "num_key_value_heads": 12,
        },
        [6, 6, 6, 6],
        False,
        1_384_122_122,
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_parameter_counts_of_the_releases(name):
    shape, stages, per_stage_head, expected = SHAPES[name]
    with torch.device("meta"):
        model = CognicaPoEForCausalLM(CognicaPoEConfig(**shape, poe_stage_layers=stages, per_stage_head=per_stage_head))
    assert sum(p.numel() for p in model.parameters()) == expected


def test_parameter_names(tiny_model):
    blocks = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    expected = {"transformer.wte.weight", "lm_head.weight", "resid_lambdas", "x0_lambdas"}
    expected |= {"smear_gate.weight", "smear_lambda", "backout_lambda"}
    expected |= {f"transformer.h.{i}.{part}.weight" for i in range(5) for part in blocks}
    expected |= {f"transformer.h.{i}.attn.ve_gate.weight" for i in (0, 2, 4)}
    expected |= {f"value_embeds.{i}.weight" for i in (0, 2, 4)}
    expected |= {f"lm_head_stages.{k}.weight" for k in range(3)}
    assert set(tiny_model.state_dict()) == expected


def test_every_parameter_is_initialised():
    config = make_model().config
    model = CognicaPoEForCausalLM(config)
    zero = {name for name, p in model.named_parameters() if not p.any()}
    assert zero == {"smear_lambda"} | {f"lm_head_stages.{k}.weight" for k in range(3)} | {
        f"transformer.h.{i}.{part}.c_proj.weight" for i in range(5) for part in ("attn", "mlp")
    }
    assert model.resid_lambdas.tolist() == pytest.approx([1.15, 1.125, 1.1, 1.075, 1.05])
    assert model.x0_lambdas[[0, -1]].tolist() == pytest.approx([0.20, 0.05])
    assert model.backout_lambda.item() == pytest.approx(0.2)
    bound = math.sqrt(3 / config.hidden_size)
    for i, block in enumerate(model.transformer.h):
        for matrix in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
            assert 0.9 * bound < matrix.weight.abs().max() <= bound
        assert 0.9 * 0.4 * bound < block.mlp.c_fc.weight.abs().max() <= 0.4 * bound
        if config.has_value_embedding(i):
            assert 0 <= block.attn.ve_gate.weight.min() < block.attn.ve_gate.weight.max() <= 0.02
            assert 0.9 * bound < model.value_embeds[str(i)].weight.abs().max() <= bound
    assert 0.7 < model.transformer.wte.weight.std() < 0.9
    assert 0.0008 < model.lm_head.weight.std() < 0.0012


@pytest.mark.parametrize("layers", [[2, 1, 2], [1, 3]])
def test_forward_follows_the_definition(layers):
    model = make_model(num_hidden_layers=sum(layers), poe_stage_layers=layers, short_window=5)
    ids = torch.randint(0, 97, (1, 14))
    stages, plain = model.all_logits(ids)
    for ours, theirs in zip(stages, naive.stage_logits(model, ids[0].tolist()), strict=True):
        torch.testing.assert_close(ours[0], theirs, rtol=0, atol=1e-10)
    torch.testing.assert_close(plain[0], naive.plain_logits(model, ids[0].tolist()), rtol=0, atol=1e-10)


def test_every_forward_tells_the_same(tiny_model):
    ids = torch.randint(0, 97, (2, 30))
    stages, plain = tiny_model.all_logits(ids)
    pool = tiny_model(ids).logits
    for stage, logits in enumerate(stages):
        torch.testing.assert_close(tiny_model.forward_stage(ids, stage), logits, rtol=0, atol=1e-12)
        prefix = tiny_model.forward_aggregated(ids, stage + 1)
        torch.testing.assert_close(prefix, combine(stages[: stage + 1]), rtol=0, atol=1e-12)
    torch.testing.assert_close(tiny_model.forward_aggregated(ids), pool, rtol=0, atol=1e-12)
    torch.testing.assert_close(pool.logsumexp(-1), torch.zeros(2, 30, dtype=torch.float64), rtol=0, atol=1e-12)
    last = tiny_model(ids, logits_to_keep=1).logits
    torch.testing.assert_close(last, pool[:, -1:], rtol=0, atol=1e-12)
    tiny_model.config.poe_mode = "none"
    torch.testing.assert_close(tiny_model(ids).logits, plain, rtol=0, atol=1e-12)


def test_combiner_is_the_softmax_of_the_mean_logits():
    logits = [torch.randn(4, 11, dtype=torch.float64) * 5 for _ in range(3)]
    torch.testing.assert_close(combine(logits), torch.stack(logits).mean(0).log_softmax(-1), rtol=0, atol=1e-12)
    product = sum(z.log_softmax(-1) for z in logits).log_softmax(-1)
    torch.testing.assert_close(combine(logits, alpha=1.0), product, rtol=0, atol=1e-12)
    weighted = (0.2 * logits[0] + 1.5 * logits[1]).log_softmax(-1)
    torch.testing.assert_close(combine(logits[:2], weights=(0.2, 1.5)), weighted, rtol=0, atol=1e-12)
    half = (math.sqrt(3) * torch.stack([z.log_softmax(-1) for z in logits]).mean(0)).log_softmax(-1)
    torch.testing.assert_close(combine(logits, alpha=0.5), half, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="2 weights for 3 stages"):
        combine(logits, weights=(1.0, 1.0))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "implementation",
    ["eager", pytest.param("flex_attention", marks=pytest.mark.slow)],  # flex is compiled
)
@torch.no_grad()
def test_attention_implementations_agree(implementation, padded):
    dtype = torch.float64 if implementation == "eager" else torch.float32
    model = make_model(dtype=dtype)
    ids, mask = torch.randint(0, 97, (2, 40)), torch.ones(2, 40, dtype=torch.int64)
    mask[0, : 7 if padded else 0] = 0
    assert model.config._attn_implementation == "sdpa"
    expected = model(ids, attention_mask=mask).logits
    model.set_attn_implementation(implementation)
    found = model(ids, attention_mask=mask).logits
    tolerance = 1e-10 if implementation == "eager" else 2e-4
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=tolerance)


def test_loss_is_the_next_token_cross_entropy(tiny_model):
    ids = torch.randint(0, 97, (2, 12))
    out = tiny_model(ids, labels=ids)
    expected = -out.logits[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    assert out.loss.item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"poe_stage_layers": [2, 2]}, "sum to num_hidden_layers = 5"),
        ({"poe_stage_layers": [5, 0]}, "must be positive"),
        ({"poe_mode": "deep"}, "poe_mode is 'deep'"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"window_pattern": "SX"}, "only S"),
        ({"poe_wand_p99_bounds_per_stage_head": [1.0]}, "needs 2 bounds"),
        ({"poe_head_count": 2}, "differs from the 3 stages"),
        ({"hidden_size": 16}, "below the gate channels"),
    ],
)
def test_contradictory_configurations(fields, message):
    with pytest.raises(ValueError, match=message):
        make_model(**fields)


@pytest.mark.slow  # compiles the kernel
@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
@torch.no_grad()
def test_flex_attention_sees_the_same_windows():
    model = make_model(dtype=torch.float32, hidden_size=64, head_dim=16, short_window=20)
    ids = torch.randint(0, 97, (2, 150))
    expected = model.boundary_states(ids)[0][-1]
    model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(model.boundary_states(ids)[0][-1], expected, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        low = model.train().boundary_states(ids)[0][-1]
    assert torch.nn.functional.cosine_similarity(low.flatten(), expected.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_flex_attention_multiplies_in_the_dtype_of_autocast_in_every_layer(monkeypatch, weights):
    """Norms return fp32 under autocast, and so do value embeddings of fp32 weights; the kernel casts nothing itself."""
    model, seen = make_model(dtype=torch.float32).train(), []
    for parameter in model.parameters():
        parameter.data = parameter.data.to(weights) if parameter.ndim > 1 else parameter.data

    def kernel(module, query, key, value, mask, **options):
        seen.append((module.config.has_value_embedding(module.layer_idx), {query.dtype, key.dtype, value.dtype}))
        return query.transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flex_attention", kernel)
    model.set_attn_implementation("flex_attention")
    with torch.autocast("cpu", torch.bfloat16):
        ids = torch.randint(0, 97, (2, 40))
        x = model.embed(ids).float()
        model.run_layers(range(5), x, x, ids, model.rotary(torch.arange(40)[None]), dict.fromkeys(model.masks(x)))
    assert [dtypes for _, dtypes in seen] == [{torch.bfloat16}] * 5
    assert {embedded for embedded, _ in seen} == {True, False}


def test_a_pass_and_a_decode_step_agree_on_who_sees_whom(tiny_model):
    tiny_model.set_attn_implementation("eager")
    masks = tiny_model.masks(tiny_model.embed(torch.zeros(1, 40, dtype=torch.int64)))
    places = torch.arange(40)
    seen = visible_slots(places[:, None], places, tiny_model.config.sliding_window)
    assert set(masks) == set(seen) and seen["full_attention"].sum() > seen["sliding_attention"].sum()
    for kind, mask in masks.items():
        assert torch.equal(mask[0, 0] == 0, seen[kind])
    assert seen["sliding_attention"].sum(dim=1).max() == tiny_model.config.short_window + 1
