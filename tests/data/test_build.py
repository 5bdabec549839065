import json
import shutil

import pyarrow.parquet as pq
import pytest

from cognica_poe.data.build import build
from cognica_poe.data.manifest import load_manifest, read_documents
from cognica_poe.errors import UserError
from cognica_poe.files import MANIFEST, sha256_file, verify_manifest, write_manifest
from tests.data.corpora import origins, small, texts, write_parquet


def test_manifest_accounts_for_everything(corpus, data_dir):
    manifest = load_manifest(data_dir)
    verify_manifest(data_dir)
    given_rows = pq.read_table(corpus / "all.parquet").to_pylist()
    assert manifest.documents == len(given_rows) == 120
    assert manifest.bytes == sum(len(row["text"].encode()) for row in given_rows)
    for split in ("train", "val"):
        documents = list(read_documents(data_dir, split))
        assert manifest.splits[split].documents == len(documents)
        assert manifest.splits[split].bytes == sum(len(d.text.encode()) for d in documents)
    for shard in manifest.shards:
        assert shard.sha256 == sha256_file(data_dir / shard.file)
    assert {s.name for s in manifest.sources} == {"tales", "notes"}
    assert sum(s.share_reached for s in manifest.sources) == pytest.approx(1, abs=1e-5)
    assert sum(s.val_bytes for s in manifest.sources) == manifest.splits["val"].bytes
    assert sum(s.documents for s in manifest.sources) == manifest.documents
    table = pq.read_table(data_dir / "train-00000.parquet")
    assert table.schema.names == ["text", "source", "language", "origin"]
    assert sorted(p.name for p in data_dir.iterdir()) == [
        "MANIFEST.sha256",
        "manifest.json",
        "train-00000.parquet",
        "val-00000.parquet",
    ]


def test_every_document_lands_on_one_side_unchanged(corpus, data_dir):
    rows = {row["origin"]: row["text"] for row in pq.read_table(corpus / "all.parquet").to_pylist()}
    found = {d.origin: d.text for split in ("train", "val") for d in read_documents(data_dir, split)}
    assert found == rows
    assert not set(origins(data_dir, "train")) & set(origins(data_dir, "val"))


def test_validation_has_the_share_of_every_source(data_dir):
    manifest = load_manifest(data_dir)
    assert 0.07 < manifest.splits["val"].bytes / manifest.bytes < 0.13
    for source in manifest.sources:
        assert 0.05 < source.val_bytes / source.bytes < 0.15


def test_building_is_deterministic_and_the_seed_matters(corpus, data_dir, tmp_path):
    again = build(corpus, tmp_path / "again", val_fraction=0.1, val_min_bytes=2000, seed=3)
    assert again == load_manifest(data_dir)
    other = build(corpus, tmp_path / "other", val_fraction=0.1, val_min_bytes=2000, seed=4)
    assert other.sha256 != again.sha256
    assert set(origins(tmp_path / "other", "val")) != set(origins(data_dir, "val"))


def test_a_built_folder_can_be_built_from(data_dir, tmp_path):
    small(data_dir, tmp_path / "copy")
    assert set(origins(tmp_path / "copy", "val")) == set(origins(data_dir, "val"))
    assert set(origins(tmp_path / "copy", "train")) == set(origins(data_dir, "train"))


def test_python_docs_keeps_both_halves_of_a_file_together(tmp_path):
    manifest = build("python-docs", tmp_path / "data")
    sides = {
        split: {o.removesuffix("#docstrings") for o in origins(tmp_path / "data", split)} for split in ("train", "val")
    }
    assert not sides["train"] & sides["val"]
    assert 150_000 <= manifest.splits["val"].bytes <= 300_000
    assert manifest.splits["train"].bytes > 4e6
    assert all(source.val_documents for source in manifest.sources)
    lines = {
        split: {line.strip() for d in read_documents(tmp_path / "data", split) for line in d.text.splitlines()}
        for split in ("train", "val")
    }
    long = {line for line in lines["val"] if len(line) > 50}
    assert len(long) > 500 and len(long & lines["train"]) < 0.08 * len(long)  # code that sister modules repeat


def test_groups_are_never_parted(tmp_path):
    rows = [{"text": text, "origin": f"o{i}", "group": f"g{i % 20}"} for i, text in enumerate(texts(100))]
    write_parquet(tmp_path / "in" / "a.parquet", rows)
    small(tmp_path / "in", tmp_path / "out", val_fraction=0.3)
    group_of = {row["origin"]: row["group"] for row in rows}
    sides = [{group_of[o] for o in origins(tmp_path / "out", split)} for split in ("train", "val")]
    assert sides[0] | sides[1] == set(group_of.values()) and not sides[0] & sides[1]


def test_duplicates_and_unusable_texts_are_dropped_and_counted(tmp_path):
    wanted = texts(30)
    rows = [*wanted, wanted[0], wanted[1] + "\n\n", "  \n", None, "nul\0byte"]
    write_parquet(tmp_path / "in" / "a.parquet", [{"text": text} for text in rows])
    manifest = small(tmp_path / "in", tmp_path / "out")
    assert manifest.documents == 30
    assert manifest.dropped == {"duplicate": 2, "empty": 2, "nul byte": 1}


def test_training_text_that_repeats_validation_is_dropped(tmp_path):
    lines = [f"the line number {i} of a text that is long enough to be told apart" for i in range(40)]
    held = "\n".join(lines[:20])
    copied = "\n".join(
        ["first a word of introduction", *lines[:20], "and a last word that is a little longer than usual"]
    )
    inside = "\n".join([*texts(3, 300), *lines[:15]])
    distant = "\n".join([*lines[:2], *lines[20:]])
    write_parquet(tmp_path / "in" / "a-val.parquet", [{"text": held}])
    write_parquet(tmp_path / "in" / "a-train.parquet", [{"text": t} for t in (copied, inside, distant, held)])
    manifest = small(tmp_path / "in", tmp_path / "out")
    assert [d.text for d in read_documents(tmp_path / "out", "train")] == [distant]
    assert manifest.dropped == {"duplicate": 1, "validation text": 2}


def test_max_bytes_takes_a_sample_of_every_source(corpus, tmp_path):
    whole = small(corpus, tmp_path / "whole")
    part = small(corpus, tmp_path / "part", max_bytes=whole.bytes // 3)
    assert 0.2 * whole.bytes < part.bytes <= whole.bytes / 3
    assert {s.name for s in part.sources} == {s.name for s in whole.sources}
    assert part.dropped["over max_bytes"] == whole.documents - part.documents


def test_larger_corpora_get_several_shards(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("cognica_poe.data.engine.texts._FLUSH_BYTES", 5_000)
    manifest = small(corpus, tmp_path / "out", shard_bytes=20_000)
    shards = [shard for shard in manifest.shards if shard.split == "train"]
    assert len(shards) > 3 and sum(shard.documents for shard in shards) == manifest.splits["train"].documents
    assert len(origins(tmp_path / "out", "train")) == len(set(origins(tmp_path / "out", "train")))


def test_other_mistakes(corpus, data_dir, tmp_path):
    with pytest.raises(UserError, match="no mix and no file or folder is called nowhere"):
        small("nowhere", tmp_path / "out")
    with pytest.raises(UserError, match="supported are"):
        (tmp_path / "a.doc").write_text("x")
        small(tmp_path / "a.doc", tmp_path / "out")
    with pytest.raises(UserError, match="too little text"):
        small(corpus, tmp_path / "out", val_min_bytes=10**9)
    with pytest.raises(UserError, match="is what is read"):
        small(data_dir, data_dir)
    with pytest.raises(UserError, match="val_min_bytes 0"):
        small(corpus, tmp_path / "out", val_min_bytes=0)
    with pytest.raises(UserError, match="val_fraction"):
        small(corpus, tmp_path / "out", val_fraction=0.6)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["thesis.txt", "manifest.json"])
def test_a_folder_of_other_things_is_never_replaced(corpus, name, tmp_path):
    (tmp_path / name).write_text("years of work")
    with pytest.raises(UserError, match="not a data folder made by cognica-poe"):
        small(corpus, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "years of work"


def test_data_that_was_added_to_stays(corpus, tmp_path):
    small(corpus, tmp_path / "data")
    (tmp_path / "data" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not a data folder made by cognica-poe"):
        small(corpus, tmp_path / "data", seed=9)
    assert (tmp_path / "data" / "notes.txt").is_file() and load_manifest(tmp_path / "data").seed == 0


def test_output_inside_the_input_and_input_inside_the_output(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "in" / "deep")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"lies inside .*, which is read"):
        small(tmp_path / "in", tmp_path / "in" / "out")
    with pytest.raises(UserError, match="is not a data folder"):
        small(tmp_path / "in" / "deep", tmp_path / "in")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_data_folder_of_ours_is_replaced(corpus, tmp_path):
    small(corpus, tmp_path / "data")
    small(corpus, tmp_path / "data", seed=9)
    verify_manifest(tmp_path / "data")
    assert load_manifest(tmp_path / "data").seed == 9


def test_no_document_of_a_split_is_read_before_all_of_it_is_compared(corpus, tmp_path):
    small(corpus, tmp_path / "data")
    shard = next(s for s in load_manifest(tmp_path / "data").shards if s.split == "train")
    file = tmp_path / "data" / shard.file
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=rf"{shard.file} is corrupt: its sha256 is .* expected {shard.sha256[:12]}"):
        next(read_documents(tmp_path / "data", "train"))
    assert next(read_documents(tmp_path / "data", "val"))


def test_damaged_data_folders(corpus, tmp_path):
    small(corpus, tmp_path / "data")
    shard = tmp_path / "data" / "val-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:200])
    with pytest.raises(UserError, match="is corrupt"):
        list(read_documents(tmp_path / "data", "val"))
    shard.unlink()
    with pytest.raises(UserError, match="is missing"):
        list(read_documents(tmp_path / "data", "val"))
    with pytest.raises(UserError, match="unknown split"):
        list(read_documents(tmp_path / "data", "test"))
    manifest = tmp_path / "data" / "manifest.json"
    described = json.loads(manifest.read_text())

    def write(text):
        manifest.write_text(text)
        write_manifest(tmp_path / "data", "data")

    for name in ("../../x", "/etc/passwd", "a/b.parquet", ""):
        write(json.dumps({**described, "shards": [{**described["shards"][0], "file": name}]}))
        with pytest.raises(UserError, match=r"shard .* cannot be used as a name"):
            list(read_documents(tmp_path / "data", "train"))
    write('{"mix": "x"}')
    with pytest.raises(UserError, match="not valid"):
        load_manifest(tmp_path / "data")
    manifest.write_text("{}")
    with pytest.raises(UserError, match=r"manifest\.json is corrupt"):
        load_manifest(tmp_path / "data")
    (tmp_path / "data" / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"has no MANIFEST\.sha256"):
        load_manifest(tmp_path / "data")
    with pytest.raises(UserError, match="not found"):
        load_manifest(tmp_path / "nothing")
