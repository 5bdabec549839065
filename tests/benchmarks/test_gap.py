"""The study of the gap: every arm is a run, and the rule says of made-up results what is known of them."""

import numpy as np
import pytest

from benchmarks.gap.arms import ARMS, MODEL, Job, recipe_of
from benchmarks.gap.evaluation import OPENING, evaluate
from benchmarks.gap.plots import write_plots
from benchmarks.gap.report import Comparison, Draws, bpb, choose_rates, load_results
from benchmarks.gap.training import write_result
from cognica_poe import pipeline
from cognica_poe.data.manifest import read_documents
from cognica_poe.errors import UserError
from cognica_poe.files import write_json
from cognica_poe.recipe.rules import check_run
from cognica_poe.training.build import build_model
from tests.runs import small_recipe, write_texts

DOCUMENTS, TOKENS = 60, 20_004_864


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_run(arm):
    recipe = check_run(recipe_of(Job(arm, 20_000_000, 0), "text"))
    assert recipe.training.steps * recipe.training.batch_rows * recipe.model.max_position_embeddings == TOKENS
    assert recipe.training.schedule.warmup_steps == recipe.training.steps // 40


def test_arms_of_one_shape_and_seed_begin_alike():
    first = build_model(recipe_of(Job("C1", 1_000_000, 3), "text").model, 3).state_dict()
    for arm in ("T1", "T2", "T3", "T4", "T4e", "T5"):
        other = build_model(recipe_of(Job(arm, 1_000_000, 3), "text").model, 3).state_dict()
        assert first.keys() == other.keys()
        for name, value in first.items():
            assert (value == other[name]).all(), (arm, name)
    again = build_model(recipe_of(Job("C1", 1_000_000, 4), "text").model, 4).state_dict()
    assert (first["transformer.wte.weight"] != again["transformer.wte.weight"]).any()


def test_heads_are_a_small_part():
    groups = build_model(MODEL)
    heads = sum(p.numel() for name, p in groups.named_parameters() if name.startswith("lm_head"))
    trunk = sum(p.numel() for name, p in groups.named_parameters() if name.startswith("transformer.h."))
    assert heads < 0.25 * trunk


def made_up(arm, seed, level, stage0=0.05, rate=0.5, noise=0.01):
    """A result whose pool is ``level`` of C1's, with documents of their own difficulty."""
    difficulty = np.random.default_rng(seed).uniform(0.8, 1.2, DOCUMENTS)
    own = np.random.default_rng(100 + sum(map(ord, arm)) + seed).normal(1.0, noise, DOCUMENTS)
    nats = 1000.0 * difficulty * own * level
    paths = {"full": nats, "stage0": nats * (1 + stage0), "stage1": nats * 1.001, "plain": nats}
    if arm == "C1":  # whose pool is worse than its deepest stage
        paths = {"full": nats * 1.07, "stage0": nats * 1.2, "stage1": nats, "plain": nats}
    if arm in ("C0", "C2"):
        paths = {"full": nats, "stage0": nats, "plain": nats}
    return {
        "job": f"{arm}-{seed}",
        "arm": arm,
        "tokens": TOKENS,
        "seed": seed,
        "rate": 1.0,
        "parameters": 3_000_000,
        "bytes": [1000] * DOCUMENTS,
        "targets": [500] * DOCUMENTS,
        "nats": {name: list(values) for name, values in paths.items()},
        "agreement": None if arm in ("C0", "C2") else 0.8,
        "agreement_positions": 1000,
        "proposed": [0] * 20 if arm in ("C0", "C2") else [100] * 20,
        "accepted": [0] * 20 if arm in ("C0", "C2") else [int(100 * rate)] * 20,
        "peak_bytes": 1,
        "operations": 1,
    }


def comparison(**levels):
    rates = {"C1": 0.6, "T3": 0.795}
    results = [
        made_up(arm, seed, level, rate=rates.get(arm, 0.8)) for arm, level in levels.items() for seed in range(2)
    ]
    return Comparison(results, TOKENS)


def test_verdicts_follow_the_rule():
    found = comparison(C0=1.0, C1=1.0, C2=1.10, T1=1.06, T2=1.03, T3=1.004, T4=1.0)
    assert found.gate()["passed"] and found.gate()["relative"] == pytest.approx(0.1, abs=0.01)
    rows = {arm: found.row(arm) for arm in ("C1", "T1", "T2", "T3", "T4")}
    assert {arm: row["verdict"] for arm, row in rows.items()} == {
        "C1": "control",
        "T1": "behind",
        "T2": "progress",
        "T3": "success",
        "T4": "success",
    }
    assert rows["T1"]["low"] < 0.06 < rows["T1"]["high"]
    assert rows["T1"]["depth_yield"] == pytest.approx(0.4, abs=0.1)
    assert rows["T3"]["acceptance_ratio"]["value"] == pytest.approx(0.79 / 0.8)
    assert rows["T1"]["compute_factor"] > rows["T2"]["compute_factor"] > 1.0


def test_a_good_pool_without_a_drafter_is_no_success():
    results = [made_up(arm, s, level, rate=r) for arm, level, r in (("C1", 1, 0.5), ("T1", 1.06, 0.8)) for s in (0, 1)]
    slow = Comparison([*results, *(made_up("T3", s, 1.0, rate=0.6) for s in (0, 1))], TOKENS)
    assert slow.row("T3")["verdict"] != "success"


def test_backprop_answers_with_its_deepest_stage():
    """Its early exits teach nothing; a pool that holds them would let every arm pass."""
    found = comparison(C1=1.0, T1=1.06)
    assert found.gap("T1", "C1")["value"] == pytest.approx(0.06, abs=0.01)
    assert found.row("C1")["pool_gap"] == 0.0


def test_without_a_gap_the_gate_is_shut():
    assert not comparison(C0=1.0, C1=1.0, C2=1.03).gate()["passed"]
    assert comparison(C1=1.0).gate() is None


def test_no_result_is_no_row():
    assert comparison(C1=1.0).row("T1") is None


def test_the_better_of_two_rates_counts_for_everybody():
    results = [made_up("C1", 0, 1.0), {**made_up("C1", 0, 0.98), "rate": 2.0}, made_up("T1", 0, 1.06)]
    assert choose_rates(results, TOKENS)["C1"] == 2.0
    assert Comparison(results, TOKENS).gap("T1", "C1")["value"] == pytest.approx(1.06 / 0.98 - 1, abs=0.01)


def test_intervals_grow_with_what_seeds_differ_by():
    """Documents alone would give a narrow interval around two seeds that disagree."""
    draws = Draws.make(2, 50)
    nats, alike = np.full((2, 50), 10.0), np.full((2, 50), 10.0)
    apart = nats * np.array([[1.0], [1.1]])
    wide = draws.interval(lambda a, b: a / b - 1.0, apart, nats)
    narrow = draws.interval(lambda a, b: a / b - 1.0, alike, nats)
    assert (wide["low"], wide["high"]) == pytest.approx((0.0, 0.1), abs=1e-9)
    assert narrow["high"] - narrow["low"] < 1e-9


def test_results_are_read_from_their_folder(tmp_path):
    with pytest.raises(UserError, match="holds no results"):
        load_results(tmp_path)
    write_json(tmp_path / "T1-20M-s0.json", made_up("T1", 0, 1.0))
    assert [result["arm"] for result in load_results(tmp_path)] == ["T1"]


@pytest.mark.parametrize("mode", ["flat", "none"])
def test_a_model_is_measured_document_by_document(mode, tmp_path):
    """And the result is read back as it was written."""
    recipe = small_recipe(write_texts(tmp_path / "texts"), mode, micro_rows=2, compute_dtype="float32")
    pipeline.prepare(recipe, tmp_path / "run", lambda line: None)
    model = build_model(recipe.model, 0)
    result = evaluate(Job("T1", 40_000, 0), recipe, model, tmp_path / "run", lambda line: None)
    documents = list(read_documents(tmp_path / "run" / "data", "val"))
    assert result["bytes"] == [len(document.text[:OPENING].encode()) for document in documents]
    assert all(len(nats) == len(documents) for nats in result["nats"].values())
    bits = bpb(result)
    assert bits * sum(result["bytes"]) == pytest.approx(
        sum(result["targets"]) * np.log2(recipe.model.vocab_size), rel=0.1
    )
    assert all(0 <= a <= p for a, p in zip(result["accepted"], result["proposed"], strict=True))
    assert (sum(result["proposed"]) > 0) == (mode == "flat") == (result["agreement"] is not None)
    assert result["peak_bytes"] > 4 * 32 * 2 * recipe.model.max_position_embeddings and result["operations"] > 0
    write_result(tmp_path / "results" / "T1-s0.json", result)
    assert load_results(tmp_path / "results") == [result]


def test_arms_are_drawn_and_the_limits_with_them(tmp_path):
    found = comparison(C0=1.0, C1=1.0, C2=1.1, T1=1.06, T3=1.004)
    rows = [found.row(arm) for arm in ("C0", "C1", "C2", "T1", "T3")]
    summary = {"tokens": TOKENS, "arms": rows}
    files = write_plots(summary, tmp_path / "plots")
    first = [file.read_text() for file in files]
    assert [file.name for file in files] == ["gap.svg", "drafts.svg"]
    assert "flat: local losses" in first[0] and "backprop, exits that teach nothing" not in first[0]
    assert [file.read_text() for file in write_plots(summary, tmp_path / "plots")] == first
    with pytest.raises(UserError, match="nothing to draw"):
        write_plots({"tokens": TOKENS, "arms": [found.row("C1")]}, tmp_path)
