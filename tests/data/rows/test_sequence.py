"""Rows by shard: which shard comes when, what is packed ahead and deleted, what one step or one text costs to find."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from cognica_poe.data import manifest as manifests
from cognica_poe.data.build import build
from cognica_poe.data.rows import ahead
from cognica_poe.data.rows.reader import Rows
from cognica_poe.data.rows.sequence import RowSettings
from cognica_poe.data.rows.store import row_file
from cognica_poe.errors import UserError


@pytest.fixture(scope="module")
def sharded(corpus, tmp_path_factory):
    """Data of several training shards."""
    folder = tmp_path_factory.mktemp("sharded") / "data"
    build(corpus, folder, val_fraction=0.1, val_min_bytes=2000, seed=3, shard_bytes=40_000)
    return folder


@pytest.fixture
def make(sharded, tokenizer, tmp_path):
    def rows(folder="rows", **changes):
        return Rows(sharded, tokenizer.folder, tmp_path / folder, **{"seed": 1, "row_len": 65, **changes})

    return rows


def orders(rows, epochs):
    """The numbers of the shards in the order in which the rows of every epoch come."""
    found, position = [], 0
    for epoch in range(epochs):
        seen = []
        for _ in range(rows.rows_per_epoch(epoch)):
            at, shard, _ = rows.locate(position)
            assert at == epoch
            seen += [shard] if shard not in seen[-1:] else []
            position += 1
        found.append(seen)
    return found


def test_epoch_0_has_the_order_of_the_folder_and_later_ones_their_own(make):
    rows = make()
    assert rows.shards >= 4
    first, *later = orders(rows, 4)
    assert first == list(range(rows.shards))
    assert all(sorted(order) == first for order in later) and len({tuple(order) for order in [first, *later]}) == 4
    shuffled = orders(make("other", order="shuffled"), 3)
    assert shuffled[0] != first and shuffled[1:] == later[:2]
    assert make(order="shuffled").fingerprint != rows.fingerprint
    assert make(split="val").settings.shard_order(3, 4) == [0, 1, 2, 3]


def test_a_shard_is_packed_from_nothing_but_itself(make, sharded, tmp_path, monkeypatch):
    rows = make()
    rows.batch(0, 4)
    assert sorted(path.name for path in (tmp_path / "rows").glob("*.json")) == ["rows-train-epoch0-shard0.json"]
    facts = rows.facts(0, 2)
    shard = rows.manifest.shards_of("train")[2]
    assert facts.documents == shard.documents and facts.data == rows.manifest.split_sha256("train", 2)


def test_the_sequence_is_the_same_wherever_reading_begins(make, tmp_path):
    rows = make()
    whole = rows.batch(0, rows.rows_per_epoch(0) + rows.rows_per_epoch(1) + 8)
    middle = (rows.rows_per_epoch(0) + rows.facts(1, 0).rows // 2) // 4  # in the middle of a shard
    for folder in ("rows", "elsewhere"):
        again = make(folder)
        assert (again.batch(middle, 4) == whole[4 * middle : 4 * middle + 4]).all()
    left = {path.name for path in (tmp_path / "elsewhere").iterdir()}
    passed = row_file(tmp_path, "train", 0, "", 1).name
    assert f"{passed}.json" in left and f"{passed}.npz" in left and f"{passed}.bin" not in left  # counted, not kept


def test_documents_of_a_step_read_one_shard(make, monkeypatch):
    rows = make()
    step = rows.facts(0, 0).rows // 4 + 3  # in the second shard
    batch, read = rows.batch(step, 4), []
    compare = manifests.require_sha256
    monkeypatch.setattr(manifests, "require_sha256", lambda file, *a: read.append(file.name) or compare(file, *a))
    found = rows.documents(step, 4)
    assert {piece.shard for piece in found} == {1} and {piece.row for piece in found} == {0, 1, 2, 3}
    assert [name for name in read if name.endswith(".parquet")] == ["train-00001.parquet"]
    assert batch.shape == (4, 65)


def wait_for(condition, seconds=40.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)


def test_the_next_two_shards_are_packed_and_the_ones_before_deleted(make, tmp_path):
    rows, plain = make(), make("plain")
    total = plain.rows_per_epoch(0) + plain.rows_per_epoch(1)
    steps, there = total // 4, lambda e, s, suffix: row_file(tmp_path / "rows", "train", e, suffix, s).is_file()
    with rows.packed_ahead(4 * steps):
        for step in range(steps):
            assert (rows.batch(step, 4) == plain.batch(step, 4)).all()
            if step == 0:
                wait_for(lambda: rows.batch(0, 4) is not None and there(0, 1, ".json") and there(0, 2, ".json"))
                assert not there(0, 3, ".json")
    assert there(0, 0, ".json") and there(0, 0, ".npz") and not there(0, 0, ".bin")
    order = rows.settings.shard_order(1, rows.shards)
    assert there(1, order[-1], ".bin") and there(1, order[-2], ".bin") and not there(1, order[0], ".bin")
    assert not list((tmp_path / "rows").glob(".*"))


def test_nothing_is_packed_that_the_run_does_not_get_to(make, tmp_path):
    rows = make()
    with rows.packed_ahead(rows.facts(0, 0).rows):
        rows.batch(0, 4)
        assert rows._packer._process is None
    with rows.packed_ahead(0):
        assert rows._packer is None


def test_a_packer_that_dies_costs_a_line_and_time(make, tmp_path):
    lines = []
    rows, plain = make(log=lines.append), make("plain")
    with rows.packed_ahead(10**6):
        rows.batch(0, 4)
        rows._packer._process.kill()
        rows._packer._process.wait()
        steps = (plain.rows_per_epoch(0) + 40) // 4
        assert all((rows.batch(step, 4) == plain.batch(step, 4)).all() for step in range(steps))
    assert sum("the process that packs ahead has ended" in line for line in lines) == 1


def test_the_packer_ends_with_the_run(make, sharded, tokenizer, tmp_path):
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom cognica_poe.data.rows.reader import Rows\n"
        "rows = Rows(*map(Path, sys.argv[1:4]), seed=1, row_len=65)\n"
        "with rows.packed_ahead(10**6):\n"
        "    rows.batch(0, 4)\n"
        "    print(rows._packer._process.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    words = [sys.executable, "-c", script, sharded, tokenizer.folder, tmp_path / "rows"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        packer = int(process.stdout.readline())
        process.kill()
    wait_for(lambda: not os.path.exists(f"/proc/{packer}") or "Z" in state(packer))


def state(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


def test_what_a_packer_cannot_do_it_says_in_one_line(sharded, tmp_path, capsys, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(ahead.os, "nice", lambda by: None)
    settings = json.dumps(vars(RowSettings(1, 65)))
    assert ahead.main([str(sharded), str(tmp_path / "none"), str(tmp_path / "rows"), settings]) == 2
    signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.startswith("cognica-poe: packing ahead: tokenizer not found")


def test_shards_too_small_for_a_row_have_none(make, sharded):
    documents = [shard.documents for shard in make().manifest.shards_of("train")]
    rows = make("long", row_len=12_000)
    counts = [rows.facts(0, place).rows for place in range(rows.shards)]
    assert 0 in counts and sum(counts) > 0 and len(counts) == len(documents)
    assert rows.batch(0, sum(counts)).shape == (sum(counts), 12_000)
    with pytest.raises(UserError, match="too little text for one row of 60000"):
        make("longer", row_len=60_000).batch(0, 1)
    assert np.isfinite(rows.facts(0, counts.index(0)).kept_fraction)


def test_mistakes(make):
    with pytest.raises(UserError, match=r"unknown order 'random'; choose one of shards, shuffled"):
        make(order="random")
