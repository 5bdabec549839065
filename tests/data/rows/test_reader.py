import threading

import numpy as np
import pytest

from cognica_poe.data.manifest import read_documents
from cognica_poe.data.rows import packing
from cognica_poe.data.rows.packing import apply_case
from cognica_poe.data.rows.reader import CASES, Rows
from cognica_poe.data.rows.store import RowFile, row_file
from cognica_poe.errors import UserError
from cognica_poe.leftovers import PREFIX


@pytest.fixture
def make(data_dir, tokenizer, tmp_path):
    def rows(folder="rows", **changes):
        settings = {"seed": 1, "row_len": 65, "case_aug_prob": 0.3, **changes}
        return Rows(data_dir, tokenizer.folder, tmp_path / folder, **settings)

    return rows


def packed_rows(rows, epoch):
    """All rows of an epoch as they were packed, shard after shard."""
    found = [RowFile(rows.rows_dir, rows.facts(epoch, place)) for place in range(rows.shards)]
    return np.stack([file[row] for file in found for row in range(len(file))])


def test_batches_have_the_right_form(make, tokenizer):
    batch = make().batch(0, 4)
    assert batch.dtype == np.int64 and batch.shape == (4, 65)
    assert (batch[:, 0] == tokenizer.bos_id).all() and batch.max() <= tokenizer.bos_id


def test_the_sequence_does_not_depend_on_the_batch_size(make):
    rows = make()
    sequence = rows.batch(0, 60)
    assert (np.concatenate([rows.batch(step, 4) for step in range(15)]) == sequence).all()
    assert (np.concatenate([rows.batch(step, 3) for step in range(20)]) == sequence).all()
    # a rank of two reads its slice of the same global rows
    assert (rows.batch(7, 4)[2:] == sequence[30:32]).all()


def test_an_epoch_reads_every_row_once_and_the_next_differs(make):
    rows = make()
    first, second = rows.rows_per_epoch(0), rows.rows_per_epoch(1)
    run = rows.batch(0, first + second)
    for epoch, part in ((0, run[:first]), (1, run[first:])):
        packed = packed_rows(rows, epoch)
        assert sorted(map(bytes, part.astype(np.uint16))) == sorted(map(bytes, packed))
        assert not (part == packed).all()  # shuffled
    assert not (run[:10] == run[first : first + 10]).all()


def test_a_step_crosses_the_border_of_an_epoch(make):
    rows = make()
    first = rows.rows_per_epoch(0)
    step = first // 4
    assert (rows.batch(step, 4) == rows.batch(0, first + 8)[4 * step : 4 * step + 4]).all()
    assert rows.locate(first) == (1, 0, 0) and rows.locate(first - 1) == (0, 0, first - 1)
    whole = 3 * first  # one step of several epochs
    assert {d.epoch for d in rows.documents(0, whole)} >= {0, 1, 2}
    assert rows.batch(0, whole).shape == (whole, 65)


def test_resuming_reads_what_the_run_would_have_read(make):
    straight = make()
    expected = [straight.batch(step, 5) for step in range(60)]
    for folder in ("rows", "elsewhere"):  # with and without the packed files
        resumed = make(folder)
        for step in (59, 31, 0):
            assert (resumed.batch(step, 5) == expected[step]).all()


def test_passed_epochs_need_no_rows_on_disk(make, tmp_path):
    rows = make()
    first = rows.rows_per_epoch(0)
    expected = rows.batch(0, first + 4)[first:]
    row_file(tmp_path / "rows", "train", 0, ".bin").unlink()
    again = make()
    assert again.locate(first) == (1, 0, 0)
    assert (again._step_rows(first, 1)[0][0]) == 1
    assert not row_file(tmp_path / "rows", "train", 0, ".bin").exists()
    assert (again.batch(first // 4, 4)[-1:] == make("other").batch(first // 4, 4)[-1:]).all()
    assert len(expected) == 4


def test_the_fingerprint_tells_runs_apart(make, data_dir, tokenizer):
    fingerprint = make().fingerprint
    assert make("other").fingerprint == fingerprint
    for changes in ({"seed": 2}, {"row_len": 33}, {"case_aug_prob": 0.1}, {"split": "val"}):
        assert make(**changes).fingerprint != fingerprint


def test_documents_of_a_step_are_those_in_its_rows(make, data_dir, tokenizer):
    rows = make()
    texts = {d.origin: d.text for d in read_documents(data_dir, "train")}
    step = rows.rows_per_epoch(0) // 8  # crosses into the second epoch
    batch, found = rows.batch(step, 8), rows.documents(step, 8)
    assert {d.row for d in found} == set(range(8))
    for row in range(8):
        rebuilt = []
        for piece in (d for d in found if d.row == row):
            ids = tokenizer.encode(apply_case(texts[piece.origin], CASES.index(piece.case)))
            rebuilt += [tokenizer.bos_id, *ids[piece.start : piece.start + piece.tokens]]
        assert batch[row].tolist()[: len(rebuilt)] == rebuilt and len(rebuilt) >= 64
    assert {d.case for d in rows.documents(0, 60)} > {"as is"}


def test_validation_rows_come_in_the_order_of_the_documents(make, data_dir):
    rows = make(split="val")
    assert (rows.batch(0, rows.rows_per_epoch(0)) == packed_rows(rows, 0)).all()
    assert {d.case for d in rows.documents(0, 5)} == {"as is"}


def test_several_readers_pack_once(make, monkeypatch):
    written = []
    original = packing.write_rows
    monkeypatch.setattr(packing, "write_rows", lambda *a: (written.append(1), original(*a)))
    batches = [None] * 4

    def read(i):
        batches[i] = make().batch(2, 4)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 1
    assert all((batch == batches[0]).all() for batch in batches)


def test_leftovers_of_a_killed_process_are_removed(make, tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / f"{PREFIX}99").write_bytes(b"half")
    make().batch(0, 2)
    assert not list((tmp_path / "rows").glob("*partial*"))


def test_mistakes(make):
    with pytest.raises(UserError, match="unknown split 'test'"):
        make(split="test")
    for step, size in ((-1, 4), (0, 0)):
        with pytest.raises(UserError, match="must"):
            make().batch(step, size)
    with pytest.raises(UserError, match="too little text"):
        make(row_len=50_000, split="val").batch(0, 1)
