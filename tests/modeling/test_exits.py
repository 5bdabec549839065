"""Exits inside stages: heads of their own that answer, draft and end early, and leave all other text as it was."""

import pytest
import torch
from torch import nn

from cognica_poe.modeling.drafting_cognica_poe import DRAFTERS
from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM
from cognica_poe.modeling.request_cognica_poe import GenerationRequest
from cognica_poe.modeling.sampling_cognica_poe import TokenChoice
from cognica_poe.modeling.stages_cognica_poe import StageCache
from tests.conftest import make_model
from tests.modeling.test_decoding import SETTINGS, assert_written, prompts
from tests.modeling.test_speculation import CHOICES, VOCAB, chi_square_p, exact_joint, fifty_prompts
from tests.oracles import decoding as reference
from tests.oracles.forward import capped, rms, trunk_states

EXITS = [1, 4]
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
ROUNDING = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def soften(model, softness: float = 0.3):
    """Layers behind the first and all heads scaled down, so that heads agree often, but not always."""
    with torch.no_grad():
        for block in model.transformer.h[1:]:
            block.attn.c_proj.weight.mul_(softness)
            block.mlp.c_proj.weight.mul_(softness)
        for part in [*model.lm_head_stages, *model.lm_head_exits]:
            next(part.parameters()).mul_(softness)
    return model


def exit_model(seed: int = 0, softness: float = 0.3, **changes):
    return soften(make_model(seed, **{"poe_stage_layers": [3, 2], "poe_exit_layers": EXITS, **changes}), softness)


def without_exits(model):
    """The same model, its exits left out."""
    config = {"poe_stage_layers": model.config.poe_stage_layers, "poe_alpha": model.config.poe_alpha}
    shape = {name: getattr(model.config, name) for name in WIDE}
    plain = make_model(dtype=model.dtype, **config, **shape)
    plain.load_state_dict({name: w for name, w in model.state_dict().items() if "exits" not in name})
    return plain


@pytest.mark.parametrize("rank", [0, 5])
def test_logits_of_an_exit(rank):
    model = exit_model(exit_head_rank=rank)
    ids = torch.randint(97, (20,)).tolist()
    layers = trunk_states(model, ids)
    for exit, layer in enumerate(EXITS):
        weight = model.lm_head.weight + model.lm_head_exits[exit].weight
        expected = torch.stack([capped(weight @ rms(x)) for x in layers[layer - 1]])
        found = model.forward_exit(torch.tensor([ids]), layer)[0]
        torch.testing.assert_close(found, expected.detach(), atol=1e-10, rtol=0)


def test_names_and_parameters():
    model, thin = exit_model(), exit_model(exit_head_rank=5)
    more = {name: tuple(p.shape) for name, p in model.named_parameters() if "exits" in name}
    assert more == {f"lm_head_exits.{i}.weight": (97, 48) for i in range(2)}
    assert [name for name, _ in model.named_parameters() if name not in more] == [
        name for name, _ in without_exits(model).named_parameters()
    ]
    assert {name for name, _ in thin.named_parameters() if "exits" in name} == {
        f"lm_head_exits.{i}.{part}.weight" for i in range(2) for part in ("up", "down")
    }


def asked(model, settings: dict) -> tuple[torch.Tensor, dict, GenerationRequest]:
    ids, mask = prompts()
    options = {"attention_mask": mask, "max_new_tokens": 14, **settings}
    return ids, options, GenerationRequest.build(model, ids, **options)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_an_exit_answers(settings):
    model = exit_model()
    ids, options, checked = asked(model, settings)
    for exit, layer in enumerate(EXITS):
        expected = reference.single_exit(model, checked, exit)
        assert_written(model.generate_exit(ids, layer, **options), ids, expected, checked.pad)


@pytest.mark.parametrize("exit", [0, 1])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_an_exit_drafts(settings, exit):
    model = exit_model()
    ids, options, checked = asked(model, settings)
    accepted = proposed = 0
    for k_draft in (1, 5):
        for drafter in ("stage", "lookup"):
            rows, counts = reference.speculative(
                model, checked, exit, k_draft, drafter == "stage", reference.exit_logits
            )
            output, found = model.generate_speculative(
                ids, k_draft=k_draft, drafter=drafter, draft_layer=EXITS[exit], return_acceptance=True, **options
            )
            assert_written(output, ids, rows, checked.pad)
            assert found == counts
            accepted, proposed = accepted + counts["accepted"], proposed + counts["proposed"]
    assert 0 < accepted < proposed


@pytest.mark.parametrize("safety", [0.3, 1.0])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_early_exit_at_exits(settings, safety):
    model, bounds, of_exits = exit_model(), [0.4], [0.5, 0.1]
    ids, options, checked = asked(model, settings)
    rows, used = reference.wand_with_exits(model, checked, bounds, of_exits, safety)
    output, stages = model.generate_wand(ids, safety, bounds, return_stages_used=True, exit_bounds=of_exits, **options)
    assert_written(output, ids, rows, checked.pad)
    width = max(len(row) for row in rows)
    assert stages.tolist() == [row + [0] * (width - len(row)) for row in used]
    passing_by = model.generate_wand(ids, safety, bounds, **options)
    assert_written(passing_by, ids, reference.wand(model, checked, bounds, safety)[0], checked.pad)
    if settings == {} and safety == 0.3:  # tokens leave at exits, and it shows
        assert not torch.equal(output, passing_by)
        model.config.poe_wand_p99_bounds_per_exit = of_exits
        assert torch.equal(model.generate_wand(ids, safety, bounds, **options), output)


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", ROUNDING, ids=ROUNDING.values())
def test_greedy_text_is_bit_identical(dtype, rows, drafter):
    """To plain decoding with exits and without, for every exit, with end tokens inside drafts or without."""
    model = exit_model(dtype=dtype, **WIDE)
    plain = without_exits(model)
    ids, mask = fifty_prompts(0)
    ids, mask = ids[3 : 3 + rows, :40], mask[3 : 3 + rows, :40]  # of two rows the first is padded
    ended = []
    for ends in ([], list(range(0, 97, 9))):
        options = {"attention_mask": mask, "max_new_tokens": 60, "eos_token_id": ends, "pad_token_id": 0}
        expected = plain.generate_prefix(ids, **options)
        assert torch.equal(model.generate_prefix(ids, **options), expected)
        ended.append(expected.shape[1] < 100)
        for layer in EXITS:
            for k_draft, confidence in ((1, 0.0), (4, 0.0), (7, 0.3)):
                output, drafts = model.generate_speculative(
                    ids, 0, k_draft, True, drafter, confidence, draft_layer=layer, **options
                )
                assert torch.equal(output, expected), (layer, k_draft, confidence, ends)
                assert drafts["proposed"] > 0
    assert ended == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ROUNDING, ids=ROUNDING.values())
def test_compiled_graphs_keep_bit_identity(dtype):
    model = exit_model(dtype=dtype, **WIDE)
    ids = fifty_prompts(0)[0][1:3, :40]
    model.prepare_decoding(compile=True, width=4)
    expected = model.generate_prefix(ids, max_new_tokens=40)
    assert model.decoding_seconds_compiled() > 0
    for drafter in DRAFTERS:
        output = model.generate_speculative(ids, k_draft=7, drafter=drafter, draft_layer=1, max_new_tokens=40)
        assert torch.equal(output, expected), drafter
    model.prepare_decoding()


@pytest.mark.parametrize("dtype", ROUNDING, ids=ROUNDING.values())
def test_other_modes_write_what_they_write_without_exits(dtype):
    model = exit_model(dtype=dtype, poe_alpha=0.5, **WIDE)
    plain, ids = without_exits(model), fifty_prompts(0)[0][:2, :40]
    for method, options in (
        ("generate_prefix", {"max_stages": 1}),
        ("generate_stage", {"stage": 1}),
        ("generate_wand", {"p99_bounds": [0.3], "safety": 0.5}),
        ("generate_speculative", {"k_draft": 4}),
        ("generate_speculative", {"k_draft": 5, "drafter": "int8"}),
        ("generate_parallel_composition", {"stages": [1, 0], "stage_weights": [0.7, 0.2]}),
        ("forward_aggregated", {}),
    ):
        options |= {} if method.startswith("forward") else {"max_new_tokens": 40}
        assert torch.equal(getattr(model, method)(ids, **options), getattr(plain, method)(ids, **options)), method


def test_no_token_passes_a_layer_twice(monkeypatch):
    """While an exit drafts and its drafts are kept, layers run once per token that is written."""
    model, counts, run = exit_model(softness=0.0), [0] * 5, StageCache._run
    model.x0_lambdas.data[1:] = 0.0  # the layers behind the first exit change nothing that a norm leaves

    def counting(cache, segment, starts, used, width, wide):
        for layer in cache.config.segment_layers(segment):
            counts[layer] += sum(used)
        return run(cache, segment, starts, used, width, wide)

    monkeypatch.setattr(StageCache, "_run", counting)
    ids = fifty_prompts(0)[0][:2, :30]
    _, drafts = model.generate_speculative(ids, k_draft=4, draft_layer=1, return_acceptance=True, max_new_tokens=21)
    assert drafts["acceptance"] == 1.0
    assert counts == [2 * (30 + 20)] * 5  # the last token of a text passes no layer


def tiny_model():
    small = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    small |= {"vocab_size": VOCAB, "num_key_value_heads": 1, "poe_stage_layers": [2, 1], "poe_exit_layers": [1]}
    model = exit_model(4, 0.8, **small)
    with torch.no_grad():  # heads that clearly disagree, far from uniform
        for head in [*model.lm_head_stages, *model.lm_head_exits]:
            head.weight.add_(0.15 * torch.randn_like(head.weight))
    return model


@pytest.mark.parametrize(
    ("choice", "drafter"), [*((choice, "stage") for choice in CHOICES.values()), (CHOICES["hot"], "lookup")]
)
def test_sampled_output_follows_the_pool(choice, drafter):
    model, prompt, rows = tiny_model(), torch.tensor([[1, 4, 2, 0, 3]]), 6000
    ids, drafts = model.generate_speculative(
        prompt.expand(rows, -1), k_draft=3, drafter=drafter, draft_layer=1, return_acceptance=True, do_sample=True,
        seed=17, max_new_tokens=5, **choice,
    )  # fmt: skip
    expected = rows * exact_joint(model, prompt, TokenChoice(True, **choice))
    assert 0.2 < drafts["acceptance"] < 0.97
    assert chi_square_p(torch.bincount(ids[:, 5] * VOCAB + ids[:, 6], minlength=VOCAB**2), expected) > 1e-3


def test_the_modes_of_generate():
    model, ids = exit_model(), torch.randint(97, (1, 12))
    found = model.generate(ids, poe_mode="exit", poe_options={"layer": 4}, max_new_tokens=9)
    assert torch.equal(found, model.generate_exit(ids, 4, max_new_tokens=9))
    drafted = model.generate(ids, poe_mode="speculative", poe_options={"draft_layer": 1}, max_new_tokens=9)
    assert torch.equal(drafted, model.generate(ids, poe_mode="full", max_new_tokens=9))


def test_saved_and_loaded(tmp_path):
    model, ids = exit_model(exit_head_rank=5), torch.randint(97, (1, 12))
    model.save_pretrained(tmp_path)
    again = CognicaPoEForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert again.config.poe_exit_layers == EXITS and again.config.exit_head_rank == 5
    assert torch.equal(again.forward_exit(ids, 1), model.forward_exit(ids, 1))


def test_a_changed_exit_is_seen():
    model, ids = exit_model(dtype=torch.bfloat16), torch.randint(97, (1, 12))
    before = model.generate_exit(ids, 1, max_new_tokens=9)
    model.lm_head_exits[0].weight.data.neg_()
    after = model.generate_exit(ids, 1, max_new_tokens=9)
    assert not torch.equal(before, after)
    model.lm_head_exits[1] = nn.Sequential(model.lm_head_exits[1])
    with pytest.raises(ValueError, match=r"lm_head_exits\.1 is a Sequential: the decoding modes need"):
        model.generate_exit(ids, 1, max_new_tokens=9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, ids: m.generate_exit(ids, 2), "layer 2: no exit stands there; exits stand behind 1, 4 layers"),
        (lambda m, ids: m.generate_exit(ids, True), "layer True: no exit stands there"),
        (lambda m, ids: m.forward_exit(ids, 3), "layer 3: no exit stands there"),
        (lambda m, ids: m.generate_speculative(ids, draft_layer=3), "draft_layer 3: no exit stands there"),
        (
            lambda m, ids: m.generate_speculative(ids, 1, draft_layer=1),
            "draft_layer 1 drafts instead of a stage: leave draft_stage out",
        ),
        (lambda m, ids: m.generate_wand(ids, p99_bounds=[1.0], exit_bounds=[1.0]), "need 2 non-negative values"),
        (lambda m, ids: m.generate_wand(ids, p99_bounds=[1.0], exit_bounds=[1.0, -1.0]), "need 2 non-negative values"),
        (
            lambda m, ids: without_exits(m).generate_exit(ids, 1),
            "no exit stands there; the model has no exits",
        ),
    ],
)
def test_wrong_exits_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(exit_model(), torch.randint(97, (1, 12)))
