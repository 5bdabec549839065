"""The fast modes against the plain ones that re-run the whole text for every token."""

import pytest
import torch
from transformers import StoppingCriteria

from cognica_poe.modeling.request_cognica_poe import GenerationRequest
from tests.conftest import make_model
from tests.oracles import decoding as reference

WIDTH = 44
SETTINGS = {
    "greedy": {},
    "sampled": {"do_sample": True, "seed": 11, "temperature": 1.3, "top_k": 40, "top_p": 0.9},
    "ends": {"eos_token_id": list(range(0, 97, 8)), "pad_token_id": 3},
    "ends_sampled": {"eos_token_id": list(range(0, 97, 8)), "do_sample": True, "seed": 5},
}


@pytest.fixture(scope="module")
def model():
    """Deep layers speak more softly than the first, so that stages agree often but not always."""
    model = make_model(seed=3)
    with torch.no_grad():
        for block in model.transformer.h[2:]:
            block.attn.c_proj.weight.mul_(0.4)
            block.mlp.c_proj.weight.mul_(0.4)
        for head in model.lm_head_stages:
            head.weight.mul_(0.5)
    return model


def prompts(pads: tuple[int, ...] = (0, 12, WIDTH - 1)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 97, (len(pads), WIDTH), generator=generator)
    mask = (torch.arange(WIDTH) >= torch.tensor(pads)[:, None]).long()
    return ids * mask, mask


def request(model, settings: dict) -> tuple[torch.Tensor, dict, GenerationRequest]:
    ids, mask = prompts()
    options = {"attention_mask": mask, "max_new_tokens": 14, **settings}
    return ids, options, GenerationRequest.build(model, ids, **options)


def assert_written(output: torch.Tensor, ids: torch.Tensor, rows: list[list[int]], pad: int) -> None:
    width = max(len(row) for row in rows)
    expected = [[*prompt, *row, *[pad] * (width - len(row))] for prompt, row in zip(ids.tolist(), rows, strict=True)]
    assert output.tolist() == expected


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_fixed_pools(model, settings):
    ids, options, checked = request(model, settings)
    for stages in (1, 2, 3):
        rows = reference.prefix(model, checked, stages)
        assert_written(model.generate_prefix(ids, stages, **options), ids, rows, checked.pad)
    rows = reference.single_stage(model, checked, 1)
    assert_written(model.generate_stage(ids, 1, **options), ids, rows, checked.pad)
    for weights in (None, (1.0, 0.3)):
        rows = reference.composition(model, checked, (2, 0), weights)
        assert_written(model.generate_parallel_composition(ids, (2, 0), weights, **options), ids, rows, checked.pad)


@pytest.mark.parametrize("safety", [0.5, 1.0])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_early_exit(model, settings, safety):
    ids, options, checked = request(model, settings)
    rows, used = reference.wand(model, checked, [0.8, 0.4], safety)
    output, stages = model.generate_wand(ids, safety, [0.8, 0.4], return_stages_used=True, **options)
    assert_written(output, ids, rows, checked.pad)
    width = max(len(row) for row in rows)
    assert stages.tolist() == [row + [0] * (width - len(row)) for row in used]
    if "eos_token_id" not in settings:
        assert len(set(stages.flatten().tolist())) == (3 if safety == 0.5 else 2)


@pytest.mark.parametrize("draft_stage", [0, 1, 2])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_speculation(model, settings, draft_stage):
    ids, options, checked = request(model, settings)
    accepted = proposed = 0
    for k_draft in (1, 5):
        for drafter in ("stage", "lookup"):
            rows, counts = reference.speculative(model, checked, draft_stage, k_draft, drafter == "stage")
            output, found = model.generate_speculative(
                ids, draft_stage, k_draft, drafter=drafter, return_acceptance=True, **options
            )
            assert_written(output, ids, rows, checked.pad)
            assert found == counts
        accepted, proposed = accepted + counts["accepted"], proposed + counts["proposed"]
    assert 0 < accepted < proposed or draft_stage == 2 or "eos_token_id" in settings


def modes(model, ids, **options) -> dict[str, torch.Tensor]:
    return {
        "prefix": model.generate_prefix(ids, 2, **options),
        "stage": model.generate_stage(ids, 2, **options),
        "wand": model.generate_wand(ids, p99_bounds=[0.8, 0.4], **options),
        "speculative": model.generate_speculative(ids, k_draft=3, **options),
        "composition": model.generate_parallel_composition(ids, (0, 2), **options),
    }


def test_a_row_does_not_depend_on_its_batch(model):
    ids, mask = prompts()
    for settings in ({}, {"do_sample": True, "seed": 2}):
        together = modes(model, ids, attention_mask=mask, max_new_tokens=16, **settings)
        first = modes(model, ids[:1], max_new_tokens=16, **settings)
        for mode, output in together.items():
            assert output[0].tolist() == first[mode][0].tolist(), mode
    for row in range(3):
        alone = modes(model, ids[row : row + 1, mask[row].bool()], max_new_tokens=16)
        together = modes(model, ids, attention_mask=mask, max_new_tokens=16)
        for mode, output in together.items():
            assert output[row, WIDTH:].tolist() == alone[mode][0, mask[row].sum() :].tolist(), mode


def test_full_depth_in_every_disguise_is_generate(model):
    ids, mask = prompts()
    options = {"attention_mask": mask, "max_new_tokens": 20, "pad_token_id": 0}
    full = model.generate(ids, do_sample=False, **options).tolist()
    assert model.generate_prefix(ids, **options).tolist() == full
    assert model.generate_wand(ids, p99_bounds=[1e9, 1e9], **options).tolist() == full
    assert model.generate_wand(ids, safety=1e9, p99_bounds=[1.0, 1.0], **options).tolist() == full
    assert model.generate_parallel_composition(ids, (0, 1, 2), **options).tolist() == full
    assert model.generate_speculative(ids, **options).tolist() == full


def test_no_bounds_leave_after_the_first_stage(model):
    ids, mask = prompts()
    output, used = model.generate_wand(
        ids, p99_bounds=[0.0, 0.0], attention_mask=mask, max_new_tokens=12, return_stages_used=True
    )
    assert output.tolist() == model.generate_stage(ids, 0, attention_mask=mask, max_new_tokens=12).tolist()
    assert (used == 1).all()
    again = model.generate_wand(ids, safety=0.0, p99_bounds=[5.0, 5.0], attention_mask=mask, max_new_tokens=12)
    assert again.tolist() == output.tolist()


class Collector:
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, ids):
        self.pieces.append(ids.tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("pads", [(0,), (0, 12, 5)])
def test_streaming_gives_every_column_once(model, pads):
    ids, mask = prompts(pads)
    for settings in ({}, {"eos_token_id": list(range(0, 97, 8))}):
        for mode in ("prefix", "stage", "wand", "speculative", "composition"):
            collector = Collector()
            options = {"attention_mask": mask, "max_new_tokens": 14, "streamer": collector, **settings}
            call = {
                "prefix": lambda o: model.generate_prefix(ids, 2, **o),
                "stage": lambda o: model.generate_stage(ids, 2, **o),
                "wand": lambda o: model.generate_wand(ids, p99_bounds=[0.8, 0.4], **o),
                "speculative": lambda o: model.generate_speculative(ids, **o),
                "composition": lambda o: model.generate_parallel_composition(ids, (0, 2), **o),
            }[mode]
            output = call(options)
            assert collector.ended
            assert collector.pieces[0] == ids.tolist()
            assert collector.pieces[1:] == output[:, WIDTH:].T.tolist()


def test_stopping_criteria_cut_a_block_where_single_steps_would(model):
    class AfterSum(StoppingCriteria):
        """Ends a row once its new tokens add up to 400."""

        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, WIDTH:].sum(dim=1) > 400

    ids, _ = prompts((0,))
    options = {"max_new_tokens": 30, "stopping_criteria": [AfterSum()], "pad_token_id": 0}
    expected = model.generate(ids, do_sample=False, **options)
    assert WIDTH < expected.shape[1] < WIDTH + 30
    assert model.generate_prefix(ids, **options).tolist() == expected.tolist()
    assert model.generate_speculative(ids, k_draft=6, **options).tolist() == expected.tolist()


def test_seeds(model):
    ids, _ = prompts((0,))
    options = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 12}
    for mode in (model.generate_prefix, model.generate_speculative):
        assert mode(ids, seed=4, **options).tolist() == mode(ids, seed=4, **options).tolist()
        assert mode(ids, seed=4, **options).tolist() != mode(ids, seed=5, **options).tolist()
        torch.manual_seed(1)
        first, second = mode(ids, **options).tolist(), mode(ids, **options).tolist()
        torch.manual_seed(1)
        assert mode(ids, **options).tolist() == first != second


def first_difference(a: torch.Tensor, b: torch.Tensor) -> int | None:
    different = (a != b).nonzero()
    return int(different[0]) if len(different) else None


@torch.no_grad()
def assert_equal_up_to_a_near_tie(model, first: torch.Tensor, second: torch.Tensor, prompt: int) -> None:
    """``[T]`` texts may part only where the two best mean logits are within 2 ulps of bfloat16 at their size.

    The bound is stated for the mean of the capped logits, which decides the argmax; an ulp of bfloat16 at z is
    ``2 ** (floor(log2 |z|) - 7)``.
    """
    place = first_difference(first, second)
    if place is None:
        return
    assert place >= prompt
    mean = torch.stack([z[0, -1] for z in model.all_logits(first[None, :place])[0]]).mean(0)
    chosen = mean[torch.stack((first[place], second[place]))]
    ulp = 2.0 ** (torch.floor(torch.log2(chosen.abs().max())).item() - 7)
    best = mean.max()
    assert (best - chosen).max() < 2 * ulp, f"token {place - prompt}: {chosen.tolist()}, best {best}, ulp {ulp}"


@pytest.mark.parametrize("seed", range(2))
def test_low_precision_differs_only_at_near_ties(seed):
    model = make_model(seed=seed, dtype=torch.bfloat16)
    ids = torch.randint(0, 97, (1, 30))
    options = {"max_new_tokens": 200, "pad_token_id": 0}
    cached = model.generate(ids, do_sample=False, use_cache=True, **options)[0]
    for other in (
        model.generate(ids, do_sample=False, use_cache=False, **options)[0],
        model.generate_prefix(ids, **options)[0],
        model.generate_speculative(ids, **options)[0],
    ):
        assert_equal_up_to_a_near_tie(model, cached, other, 30)
    with pytest.raises(AssertionError, match="ulp"):
        assert_equal_up_to_a_near_tie(model, cached, model.generate_stage(ids, 0, **options)[0], 30)
