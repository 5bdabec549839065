import json

import pytest
import torch

from cognica_poe.analysis.analyzer import analyze, weights_sha256
from cognica_poe.analysis.baseline import xz_baseline
from cognica_poe.analysis.changes import Change, changes
from cognica_poe.analysis.record import read_record
from cognica_poe.data.build import build
from cognica_poe.data.manifest import read_documents
from tests.analysis.helpers import ByteTokenizer, make_texts
from tests.conftest import make_model

OPTIONS = {"step": 10, "tokens_seen": 640, "name": "tiny", "prompts": 3, "new_tokens": 6, "probe_tokens": 4}
OPTIONS |= {"drafts": 0}


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for index, text in enumerate(make_texts(60, longest=90)):
        (folder / f"{index}.txt").write_text(f"text {index} {text} end of it")
    build(str(folder), tmp_path / "data", val_fraction=0.4, val_min_bytes=100, seed=0)
    return tmp_path / "data"


def small_model(**changes):
    return make_model(dtype=torch.float32, max_position_embeddings=128, **changes)


def test_record_of_a_pool(data_dir, tmp_path):
    model, lines = small_model(), []
    options = {**OPTIONS, "baseline": {"xz_bpb": 2.0, "xz_primed_bpb": 1.5}, "drafts": 40, "log": lines.append}
    record = analyze(model, ByteTokenizer(), data_dir, **options)
    assert record.path == "pool" and len(record.bpb.stage) == 3 and len(record.wand_bounds) == 2
    assert record.bpb.prefix[-1] == record.bpb.full and record.bpb.prefix[0] == record.bpb.stage[0]
    assert record.bpb.full <= record.bpb.mean_stage  # CE of the pool = mean CE + log Z, log Z <= 0
    assert record.intervals.full[0] < record.bpb.full < record.intervals.full[1]
    for gap, other in zip(
        record.gaps.stage + record.gaps.prefix, record.bpb.stage + record.bpb.prefix[:-1], strict=True
    ):
        assert gap.low <= gap.value <= gap.high and gap.value == pytest.approx(record.bpb.full - other)
    assert record.accuracy.prefix[0] == record.accuracy.stage[0] and record.accuracy.prefix[-1] == record.accuracy.full
    assert record.validation.unit == "document" and not record.validation.sampled
    assert record.speculative.prompts == 3 and record.speculative.proposed > 0
    assert record.drafts.lengths[0].proposed >= 40 and record.drafts.probes.prompts == 7
    assert [rule.stated for rule in record.exit_rules] == [None, 0.9, 0.99, 0.999]
    assert len(record.probes) == 7 and record.routing.positions == record.validation.tokens
    assert record.model.parameters == sum(p.numel() for p in model.parameters())
    assert record.baseline.xz_primed_bpb == 1.5
    assert any("bits per byte" in line for line in lines)
    again = read_record(record.write(tmp_path / "analysis"))
    assert again.model_dump() == record.model_dump()


def test_heads_of_a_pool(data_dir):
    record = analyze(small_model(), ByteTokenizer(), data_dir, heads=True, **OPTIONS)
    assert len(record.heads.alignment) == 3 and record.heads.unique_share[0] == 1.0
    assert [(c.gauge, c.stage, c.beta) for c in record.heads.perturbations][:4] == [
        ("stored", 0, 0), ("stored", 1, 0), ("stored", 2, 0), ("stored", None, 0)
    ]  # fmt: skip
    assert record.heads.folded.norm != record.heads.norm and record.heads.recall[0].answer == "Paris"
    assert analyze(small_model(per_stage_head=False), ByteTokenizer(), data_dir, **OPTIONS).heads is None


def test_same_seed_same_bytes(data_dir, tmp_path):
    options = {**OPTIONS, "drafts": 40, "heads": True}
    files = [
        analyze(small_model(), ByteTokenizer(), data_dir, **options).write(tmp_path / name) for name in ("one", "two")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("changes", [{"poe_mode": "none"}, {"poe_mode": "none", "poe_stage_layers": [5]}])
def test_record_of_the_plain_path(data_dir, changes):
    record = analyze(small_model(**changes), ByteTokenizer(), data_dir, **OPTIONS)
    assert record.path == "plain"
    assert record.bpb.stage == record.bpb.prefix == [record.bpb.full] == [record.bpb.plain]
    assert (record.wand_bounds, record.wand.exit_fraction, record.routing) == ([], [1.0], None)
    assert record.speculative.acceptance is None and record.speculative.proposed == 0
    assert [gap.model_dump() for gap in record.gaps.stage] == [{"value": 0.0, "low": 0.0, "high": 0.0}]
    assert record.gaps.prefix == []


def test_record_of_one_stage(data_dir):
    record = analyze(small_model(poe_stage_layers=[5]), ByteTokenizer(), data_dir, **OPTIONS)
    assert record.path == "pool" and record.bpb.stage == [record.bpb.full] and record.bpb.plain != record.bpb.full
    assert record.wand_bounds == [] and record.speculative.acceptance is None


def test_what_is_kept_gives_the_change_to_another_record(data_dir, tmp_path):
    tokenizer, model, kept = ByteTokenizer(), small_model(), {}

    def measure(step, **options):
        made = analyze(model, tokenizer, data_dir, **{**OPTIONS, "step": step, **options})
        record = read_record(made.write(tmp_path))
        kept[step] = record.sums
        return record

    first, same = measure(10), measure(20)
    with torch.no_grad():
        model.lm_head.weight.mul_(4.0)  # a much worse model
    worse, other = measure(30), measure(40, val_max_bytes=300)
    found, number = changes([record.model_dump(mode="json") for record in (other, worse, same, first)], kept)
    assert [found[step].base for step in (10, 20, 30, 40)] == [None, 10, 20, 30]
    assert set(found[20].figures.values()) == {Change(0.0, 0.0, 0.0, 1.0, False)}
    bpb = found[30].figures["bpb.full"]
    assert bpb.value == pytest.approx(worse.bpb.full - first.bpb.full) and bpb.signal and 0 < bpb.low < bpb.high
    bound = found[30].figures["bounds.0"]
    assert bound.value == worse.wand_bounds[0] - same.wand_bounds[0] and bound.low <= bound.value <= bound.high
    assert set(found[30].figures) == {"bpb.full", "accuracy.full", "accuracy.stage0", "accuracy.stage1",
                                      "accuracy.stage2", "bounds.0", "bounds.1", "routing", "acceptance"}  # fmt: skip
    assert number == {"bpb": 2, "accuracy": 8, "bounds": 4, "routing": 2, "acceptance": 2}
    assert found[40].reason == "another slice" and not found[40].figures


def test_diverged_weights_give_no_record(data_dir):
    model = small_model()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match="diverged"):
        analyze(model, ByteTokenizer(), data_dir, **OPTIONS)


def test_weights_hash_sees_every_bit():
    model = small_model()
    before = weights_sha256(model)
    assert weights_sha256(small_model()) == before
    with torch.no_grad():
        model.smear_lambda.add_(1e-6)
    assert weights_sha256(model) != before
    assert weights_sha256(small_model().to(torch.bfloat16)) != before


def test_baseline_of_xz_is_stored_and_a_mismatch_is_said(data_dir):
    train, val = ([document.text for document in read_documents(data_dir, split)] for split in ("train", "val"))
    lines, baseline = [], xz_baseline(train, val)
    record = analyze(small_model(), ByteTokenizer(), data_dir, baseline=baseline, log=lines.append, **OPTIONS)
    assert record.baseline.model_dump() == baseline and baseline["val_bytes"] == record.validation.bytes
    assert not any("stands for" in line for line in lines)
    options = {"baseline": baseline, "val_max_bytes": 300, "log": lines.append, **OPTIONS}
    assert analyze(small_model(), ByteTokenizer(), data_dir, **options).validation.bytes <= 300
    assert any("stands for" in line for line in lines)


def test_figures_are_json(data_dir):
    record = analyze(small_model(), ByteTokenizer(), data_dir, **OPTIONS)
    assert json.loads(record.model_dump_json()) == record.model_dump(mode="json")
