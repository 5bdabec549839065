"""Tables over steps do not depend on the order in which steps were measured, and name what they are taken against."""

import dataclasses
import itertools
import re

import numpy as np
import pytest

from cognica_poe.analysis.analyzer import analyze
from cognica_poe.analysis.bits_per_byte import DocumentSums
from cognica_poe.analysis.record import load_records
from cognica_poe.analysis.sums import Sums, pack
from cognica_poe.data.build import build
from cognica_poe.errors import UserError
from cognica_poe.files import sha256_file
from cognica_poe.recipe.named import RECIPES
from cognica_poe.recipe.stored import save_recipe
from cognica_poe.release.card.markdown import render_card
from cognica_poe.release.export import SUMS
from cognica_poe.release.publish.hub_folder import resolve_revision
from cognica_poe.release.publish.revisions import publish
from cognica_poe.release.report.html import write_report
from cognica_poe.release.trajectory import Trajectory
from cognica_poe.training.journal import Journal
from tests.analysis.helpers import ByteTokenizer, make_texts
from tests.conftest import make_model
from tests.release.conftest import record_of, release_model

STEPS = (50, 100, 150, 200)
OPTIONS = {"tokens_seen": 640, "name": "tiny", "prompts": 6, "new_tokens": 6, "probe_tokens": 4}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "texts").mkdir()
    for index, text in enumerate(make_texts(60, longest=90)):
        (folder / "texts" / f"{index}.txt").write_text(f"text {index} {text} end of it")
    build(str(folder / "texts"), folder / "data", val_fraction=0.4, val_min_bytes=100, seed=0)
    return folder / "data"


def make_run(folder):
    """A run of 200 steps that releases every 50."""
    recipe, tiny = RECIPES["tiny"], RECIPES["tiny"].training
    training = dataclasses.replace(tiny, steps=200)
    release = dataclasses.replace(recipe.release, every=50, log_steps=False)
    folder.mkdir(parents=True)
    save_recipe(dataclasses.replace(recipe, training=training, release=release), folder / "recipe.json")
    return folder


def measure(run, data_dir, step):
    """Measure the model of ``step``, one of its own."""
    model = make_model(seed=step, max_position_embeddings=128)
    analyze(model, ByteTokenizer(), data_dir, step=step, **OPTIONS).write(run / "analysis")


def tables(run, out):
    """Card of all records, and report."""
    records = load_records(run / "analysis")
    sums = {record.step: record.sums for record in records}
    card = render_card([record.model_dump(mode="json") for record in records], {"name": "tiny"}, sums)
    return card, write_report([run], out).read_text()


def rows(card: str, title: str) -> list[list[str]]:
    """Cells of the table under a heading, without its header."""
    section = card[card.index(f"## {title}\n") :].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def test_the_order_of_measuring_changes_no_byte(data_dir, tmp_path):
    ordered, late = make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run")
    for step in STEPS:
        measure(ordered, data_dir, step)
    for step in (50, 200):
        measure(late, data_dir, step)
    card, page = tables(late, tmp_path / "early.html")
    assert [row[0] for row in rows(card, "Trajectory")] == ["50", "200"]
    assert rows(card, "Trajectory")[1][5] == "50", "the base is named"
    text = re.sub(r"<[^>]+>", " ", page)
    assert len(re.findall(r"\b100\s+no record\b", text)) == len(re.findall(r"\b150\s+no record\b", text)) >= 6
    for step in (100, 150):
        measure(late, data_dir, step)
    before, after = tables(ordered, tmp_path / "a.html"), tables(late, tmp_path / "b.html")
    assert before == after
    assert [row[5] for row in rows(after[0], "Trajectory")] == ["\u2013", "50", "100", "150"]
    assert "no record" not in after[1] and "for the 3 changes of this table" in after[0]
    full = [float(row[2]) for row in rows(after[0], "Trajectory")]
    changes = [float(row[4].split()[0]) for row in rows(after[0], "Trajectory")[1:]]
    assert changes == pytest.approx([b - a for a, b in itertools.pairwise(full)], abs=2e-4)
    for title, columns in (("Accuracy by stage", 4), ("WAND bounds", 2), ("Self-speculative decoding", 1)):
        said = " ".join(" ".join(row) for row in rows(after[0], title)[1:])
        assert len(re.findall(r"[+-]\d+\.\d+ (?:signal|noise)", said)) == 3 * columns, title


def test_a_step_that_was_left_out_says_so(data_dir, tmp_path):
    run = make_run(tmp_path / "run")
    for step in (50, 150):
        measure(run, data_dir, step)
    Journal(run / "events.jsonl", True).write({"event": "release left out", "step": 100, "reason": "x"})
    _, page = tables(run, tmp_path / "page.html")
    text = re.sub(r"<[^>]+>", " ", page)
    assert re.search(r"\b100\s+left out\b", text) and not re.search(r"\b200\s+no record\b", text), "200 was not reached"


def test_a_card_says_which_revision_has_no_record(data_dir, tmp_path):
    run = make_run(tmp_path / "run")
    measure(run, data_dir, 50)
    record = load_records(run / "analysis")[0].model_dump(mode="json")
    card = render_card([record], {"name": "tiny", "revisions": {50: "ab" * 20, 100: "cd" * 20}})
    assert rows(card, "Trajectory")[1][:2] == ["100", "no record"]
    found = Trajectory.of([record], {}, {})
    assert found.rows[0].since == "\u2013" and "two records" in found.note("bpb")


def test_the_card_of_main_has_changes_and_a_damaged_file_of_sums_is_named(make_release, tmp_path):
    releases = []
    for step, seed in ((0, 0), (100, 1)):
        generator = np.random.default_rng(seed)
        paths = ("full", "stage0", "stage1", "stage2")
        sizes = np.arange(20, 40)
        by_path = ({path: generator.random(20) * sizes for path in paths} for _ in range(2))
        file = tmp_path / f"{step}.npz"
        file.write_bytes(pack(Sums(DocumentSums(sizes, sizes, *by_path))))
        record = record_of(release_model(seed), step) | {"documents_sha256": sha256_file(file)}
        releases.append(make_release(tmp_path / f"step-{step}", step=step, seed=seed, sums=file, record=record))
    assert (releases[0] / SUMS).read_bytes() == (tmp_path / "0.npz").read_bytes()
    hub = tmp_path / "hub"
    publication = publish(releases, f"file:{hub}", "cognica/tiny-poe")
    card = (resolve_revision(hub, "cognica/tiny-poe") / "README.md").read_text()
    change = rows(card, "Trajectory")[1]
    assert re.fullmatch(r"[+-]\d\.\d{4} (signal|noise)", change[4]) and change[5] == "0"
    stored = hub / "models--cognica--tiny-poe" / "snapshots" / publication.revisions[0] / SUMS
    stored.resolve().write_bytes(b"x")
    with pytest.raises(
        UserError, match=r"analysis\.documents\.npz is corrupt: its sha256 is .*; publish that step again"
    ):
        publish([releases[1]], f"file:{hub}", "cognica/tiny-poe")
    with pytest.raises(UserError, match=r"100\.npz is corrupt: .*; analyze this step again"):
        make_release(tmp_path / "other", step=100, sums=tmp_path / "100.npz")
