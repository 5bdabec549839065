import json
import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cognica_poe.data.build import build
from cognica_poe.data.manifest import load_manifest, read_documents
from cognica_poe.data.rows import packing
from cognica_poe.data.rows.layout import lay_out_rows
from cognica_poe.data.rows.packing import apply_case, pack, random_bits
from cognica_poe.data.rows.store import SUFFIXES, RowFile, load_index, row_file
from cognica_poe.errors import UserError
from cognica_poe.files import sha256_file
from cognica_poe.seals import sealed
from tests.data.corpora import made_up_text, write_parquet

lengths_of_documents = st.lists(st.integers(1, 100), min_size=1, max_size=80)


def check_plan(lengths, row_len, order=None, heads=None):
    """Every invariant of a plan, the slow and obvious way; returns the tokens kept."""
    first, document, start, length = lay_out_rows(np.array(lengths), row_len, order, heads)
    pieces = {number: [] for number in range(len(lengths))}
    for row in range(len(first) - 1):
        used = 1  # a row is BOS, text, BOS, text ...
        for fragment in range(first[row], first[row + 1]):
            number, at, count = int(document[fragment]), int(start[fragment]), int(length[fragment])
            assert count >= 1 and at >= 0 and at + count <= lengths[number]
            pieces[number].append((at, at + count))
            used += count + (1 if fragment > first[row] else 0)
        assert used in (row_len, row_len - 1)
        if used == row_len - 1:  # one closing BOS: what stands in front of it must be over
            last = first[row + 1] - 1
            assert start[last] + length[last] == lengths[document[last]]
    for spans in pieces.values():
        spans.sort()
        assert all(a[1] <= b[0] for a, b in pairwise(spans))  # no token twice
    dropped = sum(lengths) - int(length.sum())
    assert 0 <= dropped < row_len  # the last row at most
    return int(length.sum())


@settings(max_examples=500, deadline=None)
@given(lengths_of_documents, st.integers(4, 40), st.integers(0, 3))
def test_plans_keep_their_promises(lengths, row_len, seed):
    order = np.random.default_rng(seed).permutation(len(lengths)) if seed else None
    heads = np.random.default_rng(seed).integers(0, 2, len(lengths)).astype(bool) if seed else None
    check_plan(lengths, row_len, order, heads)


def test_documents_that_fit_are_seldom_cut():
    lengths = np.random.default_rng(0).integers(5, 400, 3000)
    _, document, _, length = lay_out_rows(lengths, 257)
    check_plan(lengths.tolist(), 257)
    cut = np.unique(document[length < lengths[document]])
    assert (lengths[cut] < 257).sum() < 0.03 * len(lengths)


def test_long_documents_are_cut_into_full_rows_and_one_rest():
    _, document, start, length = lay_out_rows(np.array([1000, 23]), 257)
    mine = sorted((int(s), int(n)) for d, s, n in zip(document, start, length, strict=True) if d == 0)
    assert mine[:3] == [(0, 256), (256, 256), (512, 256)]
    heads = np.array([True, False])
    _, document, start, length = lay_out_rows(np.array([1000, 23]), 257, None, heads)
    mine = sorted((int(s), int(n)) for d, s, n in zip(document, start, length, strict=True) if d == 0)
    assert mine[-3:] == [(232, 256), (488, 256), (744, 256)]


def test_an_exact_fit_is_preferred():
    first, document, _, _ = lay_out_rows(np.array([5, 3, 2, 2]), 10)  # BOS 5 BOS 3 fills a row of ten
    assert document[first[0] : first[1]].tolist() == [0, 1]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Data of 400 documents, long and short, in upper and lower case."""
    rng = random.Random(5)
    rows = [{"text": made_up_text(rng, rng.choice([4, 30, 100, 400])).title(), "origin": f"o{i}"} for i in range(400)]
    folder = tmp_path_factory.mktemp("many")
    write_parquet(folder / "in" / "a.parquet", rows)
    build(folder / "in", folder / "data", val_fraction=0.1, val_min_bytes=100)
    return folder / "data"


def rows_of(out, facts):
    file = row_file(out, facts.split, facts.epoch, ".bin")
    return np.fromfile(file, dtype=np.uint16).reshape(facts.rows, facts.row_len)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("row_len", [17, 65, 257])
def test_rows_hold_the_documents_and_the_index_finds_them(many, tokenizer, tmp_path, split, row_len):
    facts = pack(many, tokenizer, tmp_path, split=split, row_len=row_len, seed=1, case_aug_prob=0.5)
    rows, index = rows_of(tmp_path, facts), load_index(tmp_path, facts)
    documents = list(read_documents(many, split))
    expected = [tokenizer.encode(apply_case(d.text, index.case[i])) for i, d in enumerate(documents)]
    kept = 0
    for row in range(facts.rows):
        rebuilt = []
        for f in range(index.first[row], index.first[row + 1]):
            begin = int(index.start[f])
            rebuilt += [tokenizer.bos_id, *expected[index.document[f]][begin : begin + int(index.length[f])]]
            kept += int(index.length[f])
        closing = [tokenizer.bos_id] if len(rebuilt) == row_len - 1 else []
        assert rows[row].tolist() == rebuilt + closing
    total = sum(map(len, expected))
    assert facts.document_tokens == total and facts.kept_fraction == kept / total
    assert total - kept < row_len
    if split == "train":
        assert facts.kept_fraction > 0.99
    assert facts.fragments == len(index.document) and facts.documents == len(documents)
    assert (rows[:, 0] == tokenizer.bos_id).all()


def test_case_is_drawn_for_training_documents_only(many, tokenizer, tmp_path):
    facts = pack(many, tokenizer, tmp_path, row_len=65, case_aug_prob=0.5)
    assert 0.3 < facts.lowered / facts.documents < 0.5  # half of them, four fifths lower
    assert 0.03 < facts.uppered / facts.documents < 0.2
    val = pack(many, tokenizer, tmp_path, split="val", row_len=65, case_aug_prob=0.5)
    assert val.lowered == val.uppered == 0
    plain = pack(many, tokenizer, tmp_path, row_len=65, case_aug_prob=0.0, epoch=1)
    assert plain.lowered == plain.uppered == 0


def test_case_shares_are_those_asked_for():
    case = packing._draw_cases(200_000, 0.15, 1, 2, "case")
    assert (case == 1).mean() == pytest.approx(0.12, abs=0.003)
    assert (case == 2).mean() == pytest.approx(0.03, abs=0.002)
    assert (packing._draw_cases(200_000, 0.15, 1, 3, "case") != case).mean() > 0.2


def test_packing_is_a_function(many, tokenizer, tmp_path):
    def packed(name, **changes):
        facts = pack(many, tokenizer, tmp_path / name, **{"row_len": 65, "seed": 7, "epoch": 2, **changes})
        return facts, rows_of(tmp_path / name, facts).tobytes()

    first = packed("a")
    assert packed("b") == first
    for name, changes in {"c": {"epoch": 3}, "d": {"seed": 8}, "e": {"case_aug_prob": 0.4}}.items():
        facts, data = packed(name, **changes)
        assert facts.fingerprint != first[0].fingerprint and data != first[1]


def test_validation_rows_depend_on_no_epoch(many, tokenizer, tmp_path):
    first = rows_of(tmp_path, pack(many, tokenizer, tmp_path, split="val", row_len=65, epoch=0))
    second = rows_of(tmp_path, pack(many, tokenizer, tmp_path, split="val", row_len=65, epoch=1))
    assert (first == second).all()


def test_rows_are_reused_only_when_they_are_the_same(many, tokenizer, tmp_path):
    lines = []
    facts = pack(many, tokenizer, tmp_path, row_len=65, log=lines.append)
    file = row_file(tmp_path, "train", 0, ".bin")
    before = file.stat().st_mtime_ns, file.read_bytes()
    assert pack(many, tokenizer, tmp_path, row_len=65, log=lines.append) == facts
    assert file.stat().st_mtime_ns == before[0] and len(lines) == 1
    file.write_bytes(before[1][:-10])  # cut short
    pack(many, tokenizer, tmp_path, row_len=65)
    assert file.read_bytes() == before[1]
    sidecar = row_file(tmp_path, "train", 0, ".json")
    for text, words in (
        ("{", "is not valid JSON"),
        (sidecar.read_text().replace('"rows": ', '"rows": 1'), "was changed after it was written"),
        (json.dumps(sealed({"fingerprint": facts.fingerprint})), "of another version"),
    ):
        sidecar.write_text(text)
        lines.clear()
        assert pack(many, tokenizer, tmp_path, row_len=65, log=lines.append) == facts
        assert words in lines[0] and str(sidecar) in lines[0] and lines[0].endswith("they are packed again")
    lines.clear()
    other = pack(many, tokenizer, tmp_path, row_len=65, seed=1, log=lines.append)
    assert "made from other data, tokenizer or settings; they are packed again" in lines[0]
    assert file.read_bytes() != before[1] and other.fingerprint != facts.fingerprint
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".bin", ".json", ".npz", ".sums"]


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 16
    file.write_bytes(data)


def test_rows_say_what_they_were_made_from(many, tokenizer, tmp_path):
    facts = pack(many, tokenizer, tmp_path, row_len=65, seed=3, epoch=1, case_aug_prob=0.2)
    stored = json.loads(row_file(tmp_path, "train", 1, ".json").read_text())
    assert stored["data"] == load_manifest(many).split_sha256("train") and stored["tokenizer"] == tokenizer.sha256
    assert (facts.seed, facts.epoch, facts.case_aug_prob, facts.row_len) == (3, 1, 0.2, 65)
    assert stored["sums_sha256"] == sha256_file(row_file(tmp_path, "train", 1, ".sums"))


def test_every_changed_byte_of_rows_is_told(many, tokenizer, tmp_path):
    facts = pack(many, tokenizer, tmp_path, row_len=65)
    rng, whole = random.Random(0), {suffix: row_file(tmp_path, "train", 0, suffix).read_bytes() for suffix in SUFFIXES}
    for suffix, data in whole.items():
        file = row_file(tmp_path, "train", 0, suffix)
        for at in [0, len(data) - 1, *(rng.randrange(len(data)) for _ in range(20))]:
            flip(file, at)
            with pytest.raises(UserError, match=rf"packed rows {file} (is|are) corrupt.*expected.*delete {file.name}"):
                if suffix == ".npz":
                    load_index(tmp_path, facts)
                else:
                    rows = RowFile(tmp_path, facts)
                    if suffix == ".bin":  # the row with the byte, and no other
                        assert len({rows[row].tobytes() for row in range(len(rows)) if row != at // 130}) > 1
                        rows[at // 130]
            file.write_bytes(data)
        flip(file, 1)
        file.unlink()  # what the message asks for
        assert pack(many, tokenizer, tmp_path, row_len=65) == facts and file.read_bytes() == data
        flip(file, 1)
        lines = []
        assert pack(many, tokenizer, tmp_path, row_len=65, verify=True, log=lines.append) == facts
        assert file.read_bytes() == data and "corrupt" in lines[0] and lines[0].endswith("they are packed again")


def test_a_failure_leaves_nothing_half_written(many, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(packing.np, "savez", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(UserError, match="no space left"):
        pack(many, tokenizer, tmp_path / "rows", row_len=65)
    assert not (tmp_path / "rows").exists()


def test_mistakes(many, tokenizer, tmp_path):
    with pytest.raises(UserError, match="too little text for one row"):
        pack(many, tokenizer, tmp_path, split="val", row_len=60_000)
    with pytest.raises(UserError, match="row_len 3"):
        pack(many, tokenizer, tmp_path, row_len=3)
    with pytest.raises(UserError, match=r"case_aug_prob 1\.5"):
        pack(many, tokenizer, tmp_path, row_len=65, case_aug_prob=1.5)
    assert list(tmp_path.iterdir()) == []


def test_random_bits_never_change():
    """The order of a run's data hangs on these numbers: they must be the same in every version."""
    assert random_bits(2, 1, "x").tolist() == random_bits(3, 1, "x").tolist()[:2]
    assert random_bits(2, 0, 0, "documents").tolist() == [1761763657924481651, 8149183557846067077]
    assert random_bits(1, 1, 23).tolist() != random_bits(1, 12, 3).tolist()
