import re

import pytest

from cognica_poe.data.build import build
from cognica_poe.data.engine.engines import HERE
from cognica_poe.data.engine.stages import run_task
from cognica_poe.data.epochs import pack_epochs, pack_folder, plan_pack
from cognica_poe.data.manifest import read_documents
from cognica_poe.data.rows.reader import Rows
from cognica_poe.data.rows.search import find_text
from cognica_poe.data.rows.sequence import RowSettings
from cognica_poe.data.rows.store import row_file
from cognica_poe.errors import UserError


@pytest.fixture(scope="module")
def sharded(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded") / "data"
    build(corpus, folder, val_fraction=0.1, val_min_bytes=2000, seed=3, shard_bytes=40_000)
    return folder


def test_a_text_is_found_in_every_step_that_read_it(sharded, tokenizer, tmp_path):
    rows = Rows(sharded, tokenizer.folder, tmp_path, seed=1, row_len=65)
    steps = (rows.rows_per_epoch(0) + rows.rows_per_epoch(1)) // 4
    wanted = [document for document in read_documents(sharded, "train")][5]
    found = list(find_text(rows, re.escape(wanted.text[:40]), 4, range(steps)))
    same = [d.origin for d in read_documents(sharded, "train") if wanted.text[:40] in d.text]
    expected = [(step, piece) for step in range(steps) for piece in rows.documents(step, 4) if piece.origin in same]
    assert found and [(each.step, each.piece) for each in found] == expected
    assert {each.piece.epoch for each in found} == {0, 1}
    middle = expected[len(expected) // 2][0]
    assert [(e.step, e.piece) for e in find_text(rows, re.escape(wanted.text[:40]), 4, [middle])] == [
        each for each in expected if each[0] == middle
    ]
    assert not list(find_text(rows, "no document says this", 4, range(steps)))
    with pytest.raises(UserError, match="is no regular expression"):
        list(find_text(rows, "(", 4, range(steps)))


def test_epochs_packed_beforehand_are_those_of_a_run_and_stay(sharded, tokenizer, tmp_path):
    settings = RowSettings(1, 65)
    lines = []
    packed = pack_epochs(sharded, tokenizer.folder, tmp_path / "rows", settings, 0, 2, HERE, lines.append)
    plain = Rows(sharded, tokenizer.folder, tmp_path / "plain", seed=1, row_len=65)
    assert [(f.epoch, f.shard) for f in packed] == [(e, s) for e in (0, 1) for s in range(plain.shards)]
    assert all(facts.lasting for facts in packed) and not pack_folder(tmp_path / "rows").exists()
    assert any("use larger shards" in line for line in lines)
    for epoch in (0, 1):
        for place in range(plain.shards):
            facts = plain.facts(epoch, place)
            assert facts.fingerprint in {each.fingerprint for each in packed}
            names = [row_file(tmp_path / at, "train", epoch, ".bin", facts.shard) for at in ("rows", "plain")]
            assert names[0].read_bytes() == names[1].read_bytes()
    rows = Rows(sharded, tokenizer.folder, tmp_path / "rows", seed=1, row_len=65)
    before = {path.name for path in (tmp_path / "rows").iterdir()}
    total = rows.rows_per_epoch(0) + rows.rows_per_epoch(1)
    with rows.packed_ahead(total):
        for step in range(total // 4):
            rows.batch(step, 4)
        assert rows._packer._process is None
    assert {path.name for path in (tmp_path / "rows").iterdir()} == before


def test_tasks_of_another_scheduler_leave_the_command_nothing_to_do(sharded, tokenizer, tmp_path):
    job = plan_pack(sharded, tokenizer.folder, tmp_path / "rows", RowSettings(1, 65), 0, 1)
    for number in reversed(range(job.count("pack"))):
        assert not run_task(job.folder, "pack", number).kept
    assert run_task(job.folder, "pack", 1).kept
    file = row_file(tmp_path / "rows", "train", 0, ".bin", 1)
    data = file.read_bytes()
    file.write_bytes(data[:9] + bytes([data[9] ^ 1]) + data[10:])
    lines = []
    pack_epochs(sharded, tokenizer.folder, tmp_path / "rows", RowSettings(1, 65), 0, 1, HERE, lines.append)
    assert file.read_bytes() == data
    assert f"data: pack: {job.count('pack') - 1} of {job.count('pack')} tasks were done before" in lines
