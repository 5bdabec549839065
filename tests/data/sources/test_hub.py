import dataclasses
import re
import sys
import types

import pytest

from cognica_poe import pipeline
from cognica_poe.cli.main import main
from cognica_poe.data.build import build
from cognica_poe.data.manifest import load_manifest, read_documents
from cognica_poe.data.mixes import FRONTIER_V1, MIXES, load_mix, save_mix
from cognica_poe.data.sources.hub import as_text
from cognica_poe.errors import UserError
from cognica_poe.recipe.named import RECIPES
from tests.data.corpora import PIN, pair_of_sources, texts


class Stream(list):
    """What ``load_dataset(streaming=True)`` gives."""

    def shuffle(self, seed, buffer_size):
        return self


@pytest.fixture
def hub(monkeypatch):
    """A ``datasets`` module that serves made-up rows and notes how it was asked."""
    calls = []

    def load_dataset(path, name=None, **options):
        calls.append((path, name, options))
        if path == "org/gone":
            raise ConnectionError("could not reach the hub\nsecond line")
        if path == "org/chats":
            return Stream({"data": [f"{text}", "Indeed."]} for text in texts(300, 30, seed=1))
        return Stream({"text": text, "id": f"id{i}"} for i, text in enumerate(texts(300, 30, seed=2)))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_an_unpinned_mix_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"names no revision of fineweb-edu, .*data mix frontier_v1 --out mix.json"):
        build("frontier_v1", tmp_path / "out", max_bytes=10**6)


def test_the_advice_about_an_unpinned_mix_works_to_the_letter(tmp_path, hub, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    unpinned = dataclasses.replace(pair_of_sources(revision=None), name="frontier_v1")  # of columns that ``hub`` has
    monkeypatch.setitem(MIXES, "frontier_v1", unpinned)
    with pytest.raises(UserError) as refused:
        build("frontier_v1", tmp_path / "out")
    command = re.search(r"`cognica-poe (.*?)`", str(refused.value))[1]
    main(command.split())
    assert "of: web" in capsys.readouterr().err
    file = tmp_path / "mix.json"
    file.write_text(file.read_text().replace('"revision": null', f'"revision": "{PIN}"'))
    with pytest.raises(UserError, match="pass --max-bytes"):
        build("mix.json", tmp_path / "out")
    build("mix.json", tmp_path / "out", val_min_bytes=1000, max_bytes=200_000)
    recipe = dataclasses.replace(RECIPES["3b"].data, mix="mix.json", max_bytes=200_000, val_min_bytes=1000)
    recipe = dataclasses.replace(RECIPES["tiny"], data=dataclasses.replace(recipe, tokenizer_bytes=100_000))
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, vocab_size=300))
    pipeline.prepare(recipe, tmp_path / "run", lambda line: None)
    assert load_manifest(tmp_path / "run" / "data").mix == "frontier_v1"


def test_mix_files(tmp_path, hub):
    save_mix(FRONTIER_V1, tmp_path / "m.json")
    assert load_mix(tmp_path / "m.json") == FRONTIER_V1
    save_mix(pair_of_sources(), tmp_path / "m.json")
    manifest = build(tmp_path / "m.json", tmp_path / "out", val_min_bytes=1000, max_bytes=40_000)
    assert manifest.mix == "pair"
    web, chats = manifest.sources
    assert (web.dataset, web.revision, web.licence, web.share_wanted) == ("org/web", PIN, "MIT", 0.75)
    assert web.share_reached == pytest.approx(0.75, abs=0.02) and chats.share_reached == pytest.approx(0.25, abs=0.02)
    assert 40_000 <= manifest.bytes < 41_000
    assert hub[0] == ("org/web", None, {"split": "train", "revision": PIN, "streaming": True})
    found = list(read_documents(tmp_path / "out", "train"))
    assert any(d.origin.startswith(f"org/web@{PIN}#id") for d in found)
    assert any(d.text.startswith("User: ") and d.text.endswith("\n\nAssistant: Indeed.") for d in found)


def test_scripted_datasets_are_read_from_their_files(hub, tmp_path):
    save_mix(
        pair_of_sources(files="{config}/train/*.parquet", configs=("a", "b"), languages=("en", "fr")),
        tmp_path / "m.json",
    )
    manifest = build(tmp_path / "m.json", tmp_path / "out", val_min_bytes=1000, max_bytes=40_000)
    assert [call[0] for call in hub[:2]] == ["parquet", "parquet"]
    patterns = [call[2]["data_files"]["train"] for call in hub[:2]]
    assert patterns == [f"hf://datasets/org/web@{PIN}/{config}/train/*.parquet" for config in "ab"]
    assert manifest.dropped["duplicate"] > 0  # both configurations serve the same rows here


def test_a_text_larger_than_the_size_is_left_out_and_counted(tmp_path, hub, monkeypatch):
    save_mix(pair_of_sources(), tmp_path / "m.json")
    plain = build(tmp_path / "m.json", tmp_path / "plain", val_min_bytes=1000, max_bytes=40_000)
    serve = sys.modules["datasets"].load_dataset

    def with_a_giant(path, name=None, **options):
        giant = {"text": "word " * 100_000, "id": "giant"} if path == "org/web" else {"data": ["word " * 100_000]}
        return Stream([giant, *serve(path, name, **options)])

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", with_a_giant)
    manifest = build(tmp_path / "m.json", tmp_path / "out", val_min_bytes=1000, max_bytes=40_000)
    assert manifest.dropped == {**plain.dropped, "over max_bytes": 2}
    assert (manifest.documents, manifest.bytes) == (plain.documents, plain.bytes)


def test_a_hub_mix_needs_a_size(tmp_path, hub):
    save_mix(pair_of_sources(), tmp_path / "m.json")
    with pytest.raises(UserError, match="needs a size: pass --max-bytes"):
        build(tmp_path / "m.json", tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "org/gone"}, "cannot read source web .org/gone@0123.*could not reach the hub; check the network"),
        ({"text_column": "body"}, "no column 'body' .columns: text, id."),
    ],
)
def test_hub_failures(changes, message, tmp_path, hub):
    save_mix(pair_of_sources(**changes), tmp_path / "m.json")
    with pytest.raises(UserError, match=message):
        build(tmp_path / "m.json", tmp_path / "out", max_bytes=40_000)
    assert not (tmp_path / "out").exists()


def test_without_the_datasets_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    save_mix(pair_of_sources(), tmp_path / "m.json")
    with pytest.raises(UserError, match=r"pip install 'cognica-poe\[datasets\]'"):
        build(tmp_path / "m.json", tmp_path / "out", max_bytes=40_000)


def test_conversations_become_text():
    assert as_text("plain") == "plain"
    assert as_text(["Hi", " Hello "]) == "User: Hi\n\nAssistant: Hello"
    turns = [
        {"from": "system", "value": "Be kind."},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello"},
    ]
    assert as_text(turns) == "System: Be kind.\n\nUser: Hi\n\nAssistant: Hello"
    assert as_text([{"role": "user", "content": "Hi"}]) == "User: Hi"
    assert as_text(None) == ""
