"""What eval kept, in the report of its run."""

import pytest

from cognica_poe.errors import UserError
from cognica_poe.release.report.tasks import tasks_section
from cognica_poe.serving import harness
from tests.release.records import make_record


def test_results_join_the_record_of_their_weights(tmp_path):
    records = [make_record(100), make_record(200)]
    assert tasks_section(tmp_path, records) == ""
    metrics = {"acc,none": 0.25, "acc_stderr,none": 0.05, "exact_match,strip": 0.5}
    for step, sha in ((100, records[0]["model"]["weights_sha256"]), (200, "ff" * 32)):
        for path in ("full", "stage 0"):
            task = {"metrics": metrics, "version": 1.0, "shots": 0, "samples": 40}
            found = {"path": path, "harness": "0.4.13", "limit": None, "seed": 0, "tasks": {"<b>arc": task}}
            file = tmp_path / "analysis" / f"tasks-{step}.json"
            harness.store(file, {"name": "tiny", "step": step, "weights_sha256": sha}, found)
    page = tasks_section(tmp_path, records)
    assert page.count("<tr>") == 5 and "<b>" not in page  # a head, two paths of two metrics; other weights are left out
    for cell in ("&lt;b&gt;arc", "stage 0", "exact_match (strip)", "0.2500", "0.0500", "40", "0.4.13"):
        assert cell in page
    file = tmp_path / "analysis" / "tasks-100.json"
    file.write_text(file.read_text().replace("0.25", "0.95"))
    with pytest.raises(UserError, match=r"tasks-100\.json"):
        tasks_section(tmp_path, records)
