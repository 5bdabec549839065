"""The lines of a trajectory: the same figures as JSON lines and as a table, in every revision up to its step."""

import csv
import io
import json

from cognica_poe.release.checkpoints import TABLE, TRAJECTORY, as_csv, line_of
from cognica_poe.release.publish.hub_folder import resolve_revision
from cognica_poe.release.publish.revisions import publish
from tests.release.records import make_record

ABOUT = {"progress": {"of_training": 0.5, "epoch": 1, "shard": 7, "lr_scale": 0.85, "validation_bpb": 1.25}}


def _rows(data: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(data.decode())))


def test_the_table_has_every_figure_of_the_lines_in_full():
    records = [make_record(step, stages=3) for step in (0, 100)]
    lines = [line_of(record, ABOUT, "ab" * 32, "cd" * 20) for record in records]
    rows = _rows(as_csv(lines))
    assert [row["step"] for row in rows] == ["0", "100"]
    last, record = rows[1], records[1]
    assert float(last["bpb"]) == record["bpb"]["full"]
    assert [float(last["bpb_low"]), float(last["bpb_high"])] == record["intervals"]["full"]
    for k in range(3):
        assert float(last[f"bpb_stage{k}"]) == record["bpb"]["stage"][k]
        low_high = [float(last[f"bpb_stage{k}_low"]), float(last[f"bpb_stage{k}_high"])]
        assert low_high == record["intervals"]["stage"][k]
        assert float(last[f"accuracy_stage{k}"]) == record["accuracy"]["stage"][k]
    assert [float(last["wand_bounds0"]), float(last["wand_bounds1"])] == record["wand_bounds"]
    told = {key: last[key] for key in ("epoch", "shard", "lr_scale", "weights_sha256", "revision", "commit")}
    assert told == {"epoch": "1", "shard": "7", "lr_scale": "0.85", "weights_sha256": "ab" * 32,
                    "revision": "step-100", "commit": "cd" * 20}  # fmt: skip
    columns = list(last)
    assert columns[:2] == ["step", "revision"] and columns.index("bpb_low") == columns.index("bpb") + 1
    assert columns.index("bpb_stage1") == columns.index("bpb_stage0_high") + 1


def test_what_is_missing_is_empty_and_not_zero():
    bare = {key: make_record(5)[key] for key in ("step", "model", "bpb")}
    row = _rows(as_csv([line_of(bare, {}, "ab" * 32)]))[0]
    for name in ("epoch", "lr_scale", "acceptance", "acceptance_low", "accuracy", "bpb_low", "commit", "routed"):
        assert row[name] == ""


def test_every_revision_holds_the_steps_up_to_its_own(make_release, tmp_path):
    folders: list = []
    for step in (0, 100, 300):
        folders.append(make_release(tmp_path / f"step-{step}", step=step, seed=step, earlier=list(folders)))
    hub = tmp_path / "hub"
    publication = publish(folders, f"file:{hub}", "cognica/tiny-poe")
    for step, steps in ((0, [0]), (100, [0, 100]), (300, [0, 100, 300])):
        place = resolve_revision(hub, "cognica/tiny-poe", f"step-{step}")
        lines = [json.loads(line) for line in (place / TRAJECTORY).read_text().splitlines()]
        assert [line["step"] for line in lines] == steps and not any(line["commit"] for line in lines)
        assert [int(row["step"]) for row in _rows((place / TABLE).read_bytes())] == steps
        assert f"| step-{step} " in (place / "README.md").read_text()
    main = resolve_revision(hub, "cognica/tiny-poe")
    rows = _rows((main / TABLE).read_bytes())
    assert {int(row["step"]): row["commit"] for row in rows} == publication.revisions
    assert len({row["weights_sha256"] for row in rows}) == 3
