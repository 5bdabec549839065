"""Every rule of cleaning acts in a build, from the command line and from a recipe, and every drop is counted."""

import dataclasses
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cognica_poe.cli.main import main
from cognica_poe.data.cleaning.rules import Cleaning
from cognica_poe.data.engine.engines import Engine
from cognica_poe.data.manifest import load_manifest, read_documents
from cognica_poe.errors import UserError
from tests.data.corpora import small, texts, write_parquet

QUESTION = "A train leaves the station at nine with forty people and stops at three towns on its way"


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A folder of two sources: 40 sound texts each, and one or two of every kind that a rule drops."""
    folder = tmp_path_factory.mktemp("odd")
    sound = texts(80, 60, seed=4)
    near = " ".join([*sound[0].split()[:-1], "another"])
    extra = [sound[0], near, "tiny", "long " * 2000, "+-*/" * 60, f"{texts(1, 60, seed=9)[0]} {QUESTION}", " ", "a\0b"]
    rows = [{"text": text, "source": ("web", "books")[i % 2], "language": "xx"} for i, text in enumerate(sound)]
    rows += [{"text": text, "source": "web", "language": "xx"} for text in extra]
    rows.append({"text": "Ceci est un texte en français, et il est bien assez long pour que cela se voie. " * 4,
                 "source": "books", "language": "en"})  # fmt: skip
    write_parquet(folder / "all.parquet", rows)
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "tasks.jsonl").write_text(json.dumps({"text": f"{QUESTION}. How many?"}))
    return folder


RULES = {
    "min_chars": (10, {"too short": 1}),
    "max_chars": (5000, {"too long": 1}),
    "max_symbol_share": (0.5, {"symbols": 1}),
    "check_language": (True, {"other language": 1}),
    "near_duplicates": (True, {"near duplicate": 1}),
    "exact_duplicates": (False, {"duplicate": -1}),
}
ALWAYS = {"duplicate": 1, "empty": 1, "nul byte": 1}


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_drops_what_it_is_for(rule, odd, tmp_path):
    value, change = RULES[rule]
    manifest = small(odd / "all.parquet", tmp_path / "out", cleaning=Cleaning(**{rule: value}))
    expected = {
        reason: count for reason in (ALWAYS | change) if (count := ALWAYS.get(reason, 0) + change.get(reason, 0))
    }
    assert manifest.dropped == expected
    assert manifest.cleaning[rule] == value
    by_reason = {}
    for reasons in manifest.dropped_by_source.values():
        for reason, count in reasons.items():
            by_reason[reason] = by_reason.get(reason, 0) + count
    assert by_reason == manifest.dropped
    assert manifest.read == 89 == manifest.documents + sum(manifest.dropped.values())


def test_evaluation_texts(odd, tmp_path):
    rules = Cleaning(evaluation_texts=str(odd / "evaluation"))
    manifest = small(odd / "all.parquet", tmp_path / "out", cleaning=rules)
    assert manifest.dropped == {**ALWAYS, "evaluation text": 1}
    kept = [document.text for split in ("train", "val") for document in read_documents(tmp_path / "out", split)]
    assert not any(QUESTION in text for text in kept)
    with pytest.raises(UserError, match="no file or folder is called"):
        small(odd / "all.parquet", tmp_path / "no", cleaning=Cleaning(evaluation_texts=str(odd / "nothing")))


def test_validation_leaks_can_be_left(tmp_path):
    held, others = texts(1, 300, seed=1)[0], texts(20, 60, seed=2)
    write_parquet(tmp_path / "in" / "a-val.parquet", [{"text": held}])
    write_parquet(tmp_path / "in" / "a-train.parquet", [{"text": text} for text in (f"A title\n{held}", *others)])
    assert small(tmp_path / "in", tmp_path / "closed").dropped == {"validation text": 1}
    assert small(tmp_path / "in", tmp_path / "open", cleaning=Cleaning(validation_leaks=False)).dropped == {}


def test_the_same_bytes_from_any_number_of_workers(odd, tmp_path, monkeypatch):
    monkeypatch.setattr("cognica_poe.data.build.SMALL", 0)
    rules = Cleaning(10, 5000, True, 0.5, near_duplicates=True, evaluation_texts=str(odd / "evaluation"))
    one, two = (
        small(odd / "all.parquet", tmp_path / str(n), cleaning=rules, engine=Engine.of("local", n, ())) for n in (1, 2)
    )
    assert one == two


def test_the_command_line_and_a_recipe_say_the_same(odd, tmp_path):
    words = "--min-chars 10 --near-duplicates --max-symbol-share 0.5 --val-min-bytes 100 --val-fraction 0.1"
    main(["data", "build", str(odd / "all.parquet"), "--out", str(tmp_path / "a"), *words.split()])
    manifest = load_manifest(tmp_path / "a")
    assert manifest.dropped == {**ALWAYS, "too short": 1, "symbols": 1, "near duplicate": 1}
    rules = Cleaning(min_chars=10, near_duplicates=True, max_symbol_share=0.5)
    assert small(odd / "all.parquet", tmp_path / "b", cleaning=rules).sha256 == manifest.sha256
    assert dataclasses.asdict(rules) == manifest.cleaning


ADVERSARIAL = {
    "right to left": "שָׁלוֹם עוֹלָם، مرحبا بالعالم",
    "combining": "e\u0301\u0327 Z\u0351\u036b a" + "\u0301" * 2000,
    "special tokens": "<|bos|> <|user_start|>text<|assistant_end|>",
    "zero width": "a\u200b\u200d\ufeffb\u2066c\u2069",
    "emoji": "👨\u200d👩\u200d👧 \U0001f1eb\U0001f1f7",
    "controls": "a\x01\x1b[31mb\x7f\x85\u2028c",
    "one letter": "a" * 1_000_000,
    "spaces": "x" + " " * 1_000_000 + "y",
    "private use": "\ue000\U0010fffd",
}


def test_adversarial_texts_come_through_unchanged(tmp_path):
    rows = [*texts(40, 60), *ADVERSARIAL.values()]
    write_parquet(tmp_path / "in" / "a.parquet", [{"text": text} for text in rows])
    manifest = small(tmp_path / "in", tmp_path / "out", cleaning=Cleaning(near_duplicates=True))
    kept = {document.text for split in ("train", "val") for document in read_documents(tmp_path / "out", split)}
    assert kept == set(rows) and manifest.dropped == {}


def test_bytes_that_are_no_text_are_dropped_and_counted(tmp_path):
    good = texts(40, 60)
    column = pa.array([text.encode() for text in good] + [b"\xff\xfe", b"\xed\xa0\x80", b"ok\xc3"], pa.binary())
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"text": column.view(pa.string())}), tmp_path / "in" / "a.parquet")
    manifest = small(tmp_path / "in", tmp_path / "out")
    assert manifest.dropped == {"not utf-8": 3} and manifest.documents == 40 and manifest.read == 43
