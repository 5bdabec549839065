"""The decoding benchmark: rows add up, identity is checked, synthetic acceptance is what was asked for."""

import json

import pytest
import torch

from cognica_poe.bench import decoding
from cognica_poe.bench.prompts import find_model, find_prompts
from cognica_poe.cli.main import dispatch
from cognica_poe.errors import UserError
from cognica_poe.modeling.drafting_cognica_poe import Drafts
from cognica_poe.modeling.engine_cognica_poe import natural_width
from cognica_poe.modeling.request_cognica_poe import GenerationRequest, Transcript
from cognica_poe.modeling.speculation_cognica_poe import verify
from tests.conftest import make_model

WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
PROMPTS = [torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(i)) for i in range(3)]
FIELDS = (
    "mode drafter batch k_draft dtype tokens_per_s ratio_to_cached_greedy identical_to_greedy acceptance "
    "tokens_per_round agreement"
)


@pytest.fixture(scope="module")
def found() -> dict:
    torch.set_num_threads(1)
    model = make_model(dtype=torch.bfloat16, poe_wand_p99_bounds_per_stage_head=[0.05, 0.02], **WIDE)
    settings = decoding.Settings(new_tokens=12, rounds=2, k_drafts=(3,))
    return decoding.time_contenders(model, PROMPTS, settings, True, lambda line: None)


def test_rows(found):
    rows = found["rows"]
    assert all(set(FIELDS.split()) <= set(row) for row in rows)
    names = [(row["mode"], row["drafter"]) for row in rows]
    width = natural_width(make_model(dtype=torch.bfloat16))
    assert width > 1 and names[:2] == [("full", None)] * 2 and [row["width"] for row in rows[:2]] == [width, 1]
    assert {("prefix 2", None), ("stage 0", None), ("wand", None), ("speculative", "auto")} <= set(names)
    assert max(row["ratio_to_cached_greedy"] for row in rows[:2]) == 1.0
    for row in rows:
        if row["mode"] == "speculative":
            assert row["identical_to_greedy"]
            assert row["drafter"] == "auto" or 0 < row["acceptance"] <= 1 <= row["tokens_per_round"] <= 4
        assert row["ratio_interval"][0] <= row["ratio_to_cached_greedy"] <= row["ratio_interval"][1]
    wand = next(row for row in rows if row["mode"] == "wand")
    assert sum(wand["stages_used"]) == 3 * 2 * 12 and 0 < wand["agreement"] <= 1
    assert not next(row for row in rows if row["mode"] == "stage 0")["identical_to_greedy"]


def test_peers_and_bounds(found):
    assert [peer["name"].split(",")[0] for peer in found["peers"]] == ["transformers generate"] * 2 + [
        "uncached reference"
    ]
    rate = found["rows"][0]["tokens_per_s"]
    assert found["weight_bytes_per_step"] * rate == pytest.approx(found["read_bytes_per_s"])
    assert found["step_over_floor"] == pytest.approx(found["copy_bytes_per_s"] / found["read_bytes_per_s"])
    assert 0 < found["heads_share"] < 1


def test_agreement_is_one_for_the_full_pool_and_less_for_a_stage():
    model = make_model()
    ids = PROMPTS[0]
    full = model.generate_prefix(ids, max_new_tokens=15, eos_token_id=[])
    stage = model.generate_stage(ids, 0, max_new_tokens=15, eos_token_id=[])
    assert decoding.agreement(model, [full], 15) == 1.0
    assert decoding.agreement(model, [stage], 15) < 1.0


@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_synthetic_acceptance(rate):
    request = GenerationRequest.build(make_model(), torch.zeros(4000, 1, dtype=torch.int64), eos_token_id=[])
    pool = torch.zeros(4000, 4, 97)
    pool[..., 5] = 1.0
    drafts = Drafts(torch.zeros(4000, 3, dtype=torch.int64), None, [3] * 4000)
    kept, behind = decoding.accepting(rate)(Transcript(request), pool, drafts)
    expected = rate + rate**2 + rate**3
    assert kept.double().mean().item() == pytest.approx(expected, rel=0.05)
    assert behind.eq(5).all() and not verify(Transcript(request), pool, drafts)[0].any()
    short = decoding.accepting(1.0)(Transcript(request), pool, Drafts(drafts.tokens, None, [2] * 4000))[0]
    assert short.eq(2).all()


def test_a_recipe_is_measured_with_synthetic_drafts(capsys):
    few = "--prompts 1 --prompt-tokens 8 --new-tokens 8 --rounds 1 --k-draft 3 --drafters stage --no-peers --json"
    dispatch(["bench", "decode", "tiny", *few.split()])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["synthetic_acceptance"] for row in rows if row["mode"] == "speculative"] == [0.98, 0.98]
    assert all(row["identical_to_greedy"] is None for row in rows if row["mode"] == "speculative")


@pytest.mark.parametrize(
    ("name", "message"), [("nothing-here", "no release folder and no recipe"), ("tiny-bp", "poe_mode is none")]
)
def test_unknown_checkpoints(name, message):
    with pytest.raises(UserError, match=message):
        find_model(name, torch.float32, torch.device("cpu"))


def test_prompts_that_do_not_fit():
    config = make_model().config
    with pytest.raises(UserError, match="exceed the context of 256"):
        find_prompts(None, config, None, 1, 200, 1, 100)
    rows = find_prompts(None, config, None, 3, 10, 2, 5)
    assert [list(row.shape) for row in rows] == [[2, 10]] * 3 and int(torch.stack(rows).max()) < 97


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit):
        dispatch(["bench", "decode", "--help"])
    assert "--k-draft" in capsys.readouterr().out
