import json

import numpy as np
import pytest
from pydantic import ValidationError

from cognica_poe.analysis.bits_per_byte import DocumentSums
from cognica_poe.analysis.record import (
    AnalysisRecord,
    json_schema,
    load_records,
    read_record,
    record_path,
)
from cognica_poe.analysis.record_parts import MadeFrom
from cognica_poe.analysis.sums import BINS, PositionCounts, Sums
from cognica_poe.errors import UserError
from cognica_poe.seals import write_sealed


def fields(step=100):
    return {
        "step": step,
        "tokens_seen": 1000,
        "model": {
            "name": "tiny",
            "parameters": 10,
            "poe_mode": "flat",
            "stage_layers": [2, 1],
            "weights_sha256": "0a" * 32,
        },
        "path": "pool",
        "bpb": {"full": 1.5, "stage": [1.6, 1.45], "prefix": [1.6, 1.5], "plain": 2.0, "mean_stage": 1.525},
        "accuracy": {"full": 0.5, "stage": [0.4, 0.5], "prefix": [0.4, 0.5], "plain": 0.1},
        "gaps": {
            "stage": [{"value": 1.5 - 1.6, "low": -0.2, "high": 0.1}, {"value": 1.5 - 1.45, "low": 0.01, "high": 0.06}],
            "prefix": [{"value": 1.5 - 1.6, "low": -0.2, "high": 0.1}],
        },
        "intervals": {
            "full": [1.4, 1.6],
            "stage": [[1.5, 1.7], [1.4, 1.5]],
            "prefix": [[1.5, 1.7], [1.4, 1.6]],
            "plain": [1.9, 2.1],
        },
        "accuracy_intervals": {
            "full": [0.4, 0.6],
            "stage": [[0.3, 0.5], [0.4, 0.6]],
            "prefix": [[0.3, 0.5], [0.4, 0.6]],
            "plain": [0.0, 0.2],
        },
        "wand_bounds": [0.7],
        "wand": {"safety": 1.0, "positions": 50, "exit_fraction": [0.25, 0.75], "agreement": 0.99},
        "speculative": {
            "acceptance": 0.5,
            "proposed": 8,
            "accepted": 4,
            "rounds": 2,
            "draft_stage": 0,
            "k_draft": 4,
            "prompts": 2,
        },
        "baseline": {"xz_bpb": 2.5, "xz_primed_bpb": None},
        "validation": {"documents": 3, "bytes": 100, "tokens": 50, "sha256": "ff" * 32, "window": 16},
        "probes": [
            {
                "prompt": "a",
                "continuation": "é\u202e\x1b",
                "expected": "b",
                "correct": False,
                "answer": "é",
                "reason": None,
                "facts": {"c": None},
            }
        ],
        "seconds": 1.0,
        "versions": {"torch": "2"},
    }


_SHAPES = ((3 * BINS, (1, 3, BINS)), (3 * BINS, (3, BINS)), (3 * BINS, (3, BINS)))


def sums():
    generator = np.random.default_rng(0)
    nats = {name: generator.random(3) for name in ("full", "stage0", "stage1", "plain")}
    documents = DocumentSums(np.array([30, 30, 40]), np.array([20, 10, 20]), nats, {"full": np.array([1.0, 2.0, 3.0])})
    counts = PositionCounts(*(np.arange(size, dtype=np.int32).reshape(shape) for size, shape in _SHAPES))
    return Sums(documents, counts, np.array([[4, 8], [2, 5]]))


def test_round_trip_with_document_sums(tmp_path):
    record = AnalysisRecord.model_validate(fields())
    record._sums = sums()
    path = record.write(tmp_path / "analysis")
    assert path == record_path(tmp_path / "analysis", 100) and json.loads(path.read_text())["schema_version"] == 1
    again = read_record(path)
    assert again.model_dump() == record.model_dump()
    assert again.sums.documents.stages == 2
    for name, values in record.sums.documents.nats.items():
        np.testing.assert_array_equal(again.sums.documents.nats[name], values)
    np.testing.assert_array_equal(again.sums.documents.correct["full"], [1.0, 2.0, 3.0])
    for name, values in vars(record.sums.positions).items():
        np.testing.assert_array_equal(vars(again.sums.positions)[name], values)
    np.testing.assert_array_equal(again.sums.drafts, [[4, 8], [2, 5]])
    before = path.with_suffix(".documents.npz").read_bytes()
    again.write(tmp_path / "analysis")
    assert path.with_suffix(".documents.npz").read_bytes() == before
    assert sorted(file.name for file in path.parent.iterdir()) == ["step-100.documents.npz", "step-100.json"]


def test_records_are_ordered_by_step(tmp_path):
    for step in (100, 20, 3):
        AnalysisRecord.model_validate(fields(step)).write(tmp_path)
    records = load_records(tmp_path)
    assert [record.step for record in records] == [3, 20, 100]
    assert all(record.sums is None for record in records)
    assert load_records(tmp_path / "absent") == []


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("bpb", "full"), float("nan"), "finite"),
        (("bpb", "plain"), float("inf"), "finite"),
        (("bpb", "full"), "1.5", "valid number"),
        (("bpb", "stage"), [1.6], "bpb.stage has 1"),
        (("bpb", "full"), 1.4, "gaps and bpb disagree"),
        (("gaps", "stage"), [], "gaps.stage has 0"),
        (("accuracy_intervals", "prefix"), [[0.5, 0.3], [0.4, 0.6]], "low above high"),
        (("accuracy", "full"), 1.1, "less than or equal to 1"),
        (("wand", "exit_fraction"), [0.5, 0.6], "sum to 1"),
        (("wand_bounds",), [], "wand_bounds has 0"),
        (("speculative", "accepted"), 9, "more drafts"),
        (("intervals", "full"), [2.0, 1.0], "low above high"),
        (("model", "weights_sha256"), "xyz", "pattern"),
        (("path",), "plain", "entries"),
        (("step",), -1, "greater than or equal"),
        (("schema_version",), 2, "1"),
        (("surprise",), 1, "Extra"),
    ],
)
def test_faults_are_refused(place, value, message):
    data = fields()
    target = data
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    with pytest.raises(ValidationError, match=message):
        AnalysisRecord.model_validate(data)


def test_damaged_files_are_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="not found"):
        read_record(tmp_path / "step-1.json")
    (tmp_path / "step-1.json").write_text('{"step": 1')
    with pytest.raises(UserError, match=r"step-1\.json is not valid JSON") as error:
        read_record(tmp_path / "step-1.json")
    assert "\n" not in str(error.value)
    write_sealed(tmp_path / "step-1.json", {"step": 1})
    with pytest.raises(UserError, match=r"step-1\.json is not valid: tokens_seen") as error:
        read_record(tmp_path / "step-1.json")
    assert "\n" not in str(error.value)
    record = AnalysisRecord.model_validate(fields())
    record._sums = sums()
    path = record.write(tmp_path)
    stored = path.with_suffix(".documents.npz")
    stored.write_bytes(stored.read_bytes()[:100])
    with pytest.raises(UserError, match=r"documents\.npz is corrupt"):
        read_record(path)


def test_a_record_carries_its_own_digest_and_that_of_its_sums(tmp_path):
    record = AnalysisRecord.model_validate({**fields(), "made_from": dict.fromkeys(MadeFrom.model_fields, "ab" * 32)})
    record._sums = sums()
    path = record.write(tmp_path)
    written = path.read_text()
    for old, new in (('"full": 1.5', '"full": 1.6'), ("abab", "abac"), ('"seconds": 1.0', '"seconds": 2.0')):
        path.write_text(written.replace(old, new, 1))
        with pytest.raises(UserError, match=r"step-100\.json was changed after it was written: .* expected '"):
            read_record(path)
    path.write_text(json.dumps(json.loads(written)))  # white space is no content
    again = read_record(path)
    assert again.sha256 == record.sha256 and again.made_from.data == "ab" * 32
    again.write(tmp_path)
    assert path.read_text() == written
    path.write_text(json.dumps({**fields(), "made_from": None}))
    with pytest.raises(UserError, match="carries no sha256"):
        read_record(path)


def test_schema_describes_what_is_written():
    schema = json_schema()
    written = AnalysisRecord.model_validate(fields()).model_dump(mode="json")
    assert set(written) == set(schema["properties"]) and schema["additionalProperties"] is False
    assert set(schema["$defs"]["BitsPerByte"]["properties"]) == set(written["bpb"])
    assert "path that was trained" in schema["$defs"]["BitsPerByte"]["properties"]["full"]["description"]
