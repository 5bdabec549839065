import sys
import types
from dataclasses import replace

import pytest

from cognica_poe.data.build import MIXES, build, read_documents
from cognica_poe.data.sources.hub import FRONTIER_V1, Mix, Source, as_text, load_mix, save_mix, unpinned
from cognica_poe.errors import UserError
from cognica_poe.files import read_json, write_json
from tests.data.test_build import texts

PIN = "0123456789abcdef" * 2 + "01234567"


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


def mix(**changes):
    web = Source("web", "org/web", 0.75, "MIT", revision=PIN, id_column="id")
    chats = Source("chats", "org/chats", 0.25, "CC0-1.0", revision=PIN, text_column="data")
    return Mix("pair", (replace(web, **changes), chats))


def test_frontier_v1_is_the_mix_of_the_card():
    shares = {source.name: source.share for source in MIXES["frontier_v1"].sources}
    assert len(shares) == 11
    assert list(shares.values()) == [0.335, 0.241, 0.157, 0.052, 0.052, 0.042, 0.042, 0.042, 0.021, 0.010, 0.006]
    assert sum(shares.values()) == pytest.approx(1)
    culturax = next(source for source in FRONTIER_V1.sources if source.name == "culturax")
    assert culturax.languages == ("ko", "zh", "ja", "es", "fr")
    assert all(source.licence and source.dataset.count("/") == 1 for source in FRONTIER_V1.sources)


def test_an_unpinned_mix_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no pinned revision for: fineweb-edu, .*openhermes"):
        build("frontier_v1", tmp_path / "out", max_bytes=10**6)
    assert unpinned(mix(revision="main")) == ["web"]
    assert unpinned(mix()) == []


def test_mix_files(tmp_path, hub):
    save_mix(FRONTIER_V1, tmp_path / "m.json")
    assert load_mix(tmp_path / "m.json") == FRONTIER_V1
    save_mix(mix(), tmp_path / "m.json")
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
    save_mix(mix(files="{config}/train/*.parquet", configs=("a", "b"), languages=("en", "fr")), tmp_path / "m.json")
    manifest = build(tmp_path / "m.json", tmp_path / "out", val_min_bytes=1000, max_bytes=40_000)
    assert [call[0] for call in hub[:2]] == ["parquet", "parquet"]
    patterns = [call[2]["data_files"]["train"] for call in hub[:2]]
    assert patterns == [f"hf://datasets/org/web@{PIN}/{config}/train/*.parquet" for config in "ab"]
    assert manifest.dropped["duplicate"] > 0  # both configurations serve the same rows here


def test_a_hub_mix_needs_a_size(tmp_path, hub):
    save_mix(mix(), tmp_path / "m.json")
    with pytest.raises(UserError, match="needs max_bytes"):
        build(tmp_path / "m.json", tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "org/gone"}, "cannot read source web .org/gone@0123.*could not reach the hub; check the network"),
        ({"text_column": "body"}, "no column 'body' .columns: text, id."),
    ],
)
def test_hub_failures(changes, message, tmp_path, hub):
    save_mix(mix(**changes), tmp_path / "m.json")
    with pytest.raises(UserError, match=message):
        build(tmp_path / "m.json", tmp_path / "out", max_bytes=40_000)
    assert not (tmp_path / "out").exists()


def test_without_the_datasets_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    save_mix(mix(), tmp_path / "m.json")
    with pytest.raises(UserError, match=r"pip install 'cognica-poe\[datasets\]'"):
        build(tmp_path / "m.json", tmp_path / "out", max_bytes=40_000)


def test_bad_mix_files(tmp_path):
    file = tmp_path / "m.json"
    save_mix(mix(share=0.5), file)
    with pytest.raises(UserError, match=r"add up to 1, not 0\.75"):
        load_mix(file)
    described = read_json(file)
    described["sources"][0]["colour"] = "blue"
    write_json(file, described)
    with pytest.raises(UserError, match="unknown field 'colour'"):
        load_mix(file)
    write_json(file, {"name": "x"})
    with pytest.raises(UserError, match="is not a mix"):
        load_mix(file)


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
