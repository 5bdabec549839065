"""Pinning and reading datasets of a Hub: a server on this machine stands for it, or a folder laid out as it is."""

import dataclasses
import hashlib
import json
import re
import shutil
import time

import pytest

from cognica_poe import pipeline
from cognica_poe.cli.main import main
from cognica_poe.data.build import build
from cognica_poe.data.manifest import load_manifest, read_documents
from cognica_poe.data.mixes import MIXES, load_mix, save_mix
from cognica_poe.data.sources import hub as hub_source
from cognica_poe.errors import UserError
from cognica_poe.recipe.named import RECIPES
from tests.data.corpora import PIN, pair_of_datasets, pair_of_sources, write_mirror
from tests.data.fake_datasets import FakeDatasets

SIZE = 20_000


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A server with both datasets; the client's cache is empty, and it waits milliseconds between tries."""
    from huggingface_hub import constants

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.001)))
    server = FakeDatasets()
    for dataset, files in pair_of_datasets().items():
        server.add(dataset, files)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    yield server
    server.close()


@pytest.fixture
def unpinned(tmp_path):
    """A file of the mix that names no revision."""
    mix = pair_of_sources(revision=None)
    mix = dataclasses.replace(mix, sources=(mix.sources[0], dataclasses.replace(mix.sources[1], revision=None)))
    save_mix(mix, tmp_path / "mix.json")
    return tmp_path / "mix.json"


def pin(file, out, *words):
    main(["data", "mix", "pin", str(file), "--out", str(out), *words])
    return load_mix(out)


def test_pinning_names_commit_files_sizes_and_sha256(hub, unpinned, tmp_path, capsys):
    mix = pin(unpinned, tmp_path / "pinned.json")
    for source in mix.sources:
        commit, files = hub.datasets[source.dataset]
        assert source.revision == commit
        assert {(file.path, file.size, file.sha256) for file in source.pinned} == {
            (path, len(data), hashlib.sha256(data).hexdigest()) for path, data in files.items() if "train" in path
        }
    assert mix.bytes is None and "web: org/web@" in capsys.readouterr().err
    main(["data", "mix", "show", str(tmp_path / "pinned.json")])
    shown = capsys.readouterr().out
    assert hub.datasets["org/web"][0][:12] in shown and "75.0 %" in shown and "CC0-1.0" in shown


def test_a_size_decides_how_many_files_are_named(hub, unpinned, tmp_path):
    everything = pin(unpinned, tmp_path / "all.json")
    mix = pin(unpinned, tmp_path / "some.json", "--bytes", str(SIZE // 4))
    assert mix.bytes == SIZE // 4
    assert 0 < len(mix.sources[0].pinned) < len(everything.sources[0].pinned)
    assert set(mix.sources[0].pinned) < set(everything.sources[0].pinned)
    by_tokens = pin(unpinned, tmp_path / "tokens.json", "--tokens", "1000")
    assert by_tokens.bytes == pytest.approx(4200, abs=1)


def test_a_build_reaches_the_shares_and_names_every_place(hub, unpinned, tmp_path):
    mix = pin(unpinned, tmp_path / "pinned.json", "--bytes", str(SIZE))
    manifest = build(tmp_path / "pinned.json", tmp_path / "out", val_min_bytes=1000)
    web, chats = manifest.sources
    assert web.share_reached == pytest.approx(0.75, abs=0.01) and chats.share_reached == pytest.approx(0.25, abs=0.01)
    assert 0.97 * SIZE < manifest.bytes <= SIZE
    assert (web.dataset, web.revision, web.licence) == ("org/web", mix.sources[0].revision, "MIT")
    found = list(read_documents(tmp_path / "out", "train"))
    pattern = re.compile(rf"org/web@{web.revision}:data/train-0000\d-of-00003.parquet#\d+ id\d-\d+")
    assert all(pattern.fullmatch(document.origin) for document in found if document.source == "web")
    assert any(d.text.startswith("User: ") and d.text.endswith("\n\nAssistant: Indeed.") for d in found)
    assert not any("test" in path or "valid" in path for path in hub.asked)
    assert manifest.read == manifest.documents + sum(manifest.dropped.values())


def test_a_mirror_stands_for_the_hub(hub, unpinned, tmp_path, monkeypatch):
    pin(unpinned, tmp_path / "online.json", "--bytes", str(SIZE))
    build(tmp_path / "online.json", tmp_path / "online", val_min_bytes=1000)
    for dataset, files in pair_of_datasets().items():
        write_mirror(tmp_path / "mirror", {dataset: files}, hub.datasets[dataset][0])
    monkeypatch.setenv("HF_ENDPOINT", f"file:{tmp_path / 'mirror'}")
    asked = len(hub.asked)
    assert pin(unpinned, tmp_path / "offline.json", "--bytes", str(SIZE)) == load_mix(tmp_path / "online.json")
    build(tmp_path / "offline.json", tmp_path / "offline", val_min_bytes=1000)
    assert load_manifest(tmp_path / "offline").sha256 == load_manifest(tmp_path / "online").sha256
    assert len(hub.asked) == asked


def test_a_server_that_fails_for_a_while_is_asked_again(hub, unpinned, tmp_path, capsys):
    hub.failing = 2
    mix = pin(unpinned, tmp_path / "pinned.json")
    assert "trying again in 1 s" in capsys.readouterr().err
    hub.failing, hub.cut = 1, {file.path: 2 for file in mix.sources[0].pinned}
    build(tmp_path / "pinned.json", tmp_path / "out", val_min_bytes=1000, max_bytes=SIZE)
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_the_waits_grow(monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)

    def fail():
        raise ConnectionError("reset")

    with pytest.raises(UserError, match="it cannot be had: reset; check the network"):
        hub_source.patiently(fail, "it")
    assert waits == [1, 4, 16]
    with pytest.raises(ZeroDivisionError):
        hub_source.patiently(lambda: 1 / 0, "it")


def test_a_source_that_fails_in_the_middle_is_read_on_later(hub, unpinned, tmp_path):
    mix = pin(unpinned, tmp_path / "pinned.json")
    good = pair_of_datasets()["org/chats"]
    shutil.rmtree(tmp_path / "cache")  # pinning has read what has no sha256 on the Hub
    hub.datasets["org/chats"] = (mix.sources[1].revision, {})
    with pytest.raises(UserError, match=r"source chats: org/chats@.*is not on the Hub any more; pin the mix again"):
        build(tmp_path / "pinned.json", tmp_path / "out", val_min_bytes=1000, max_bytes=SIZE)
    assert not (tmp_path / "out").exists()
    hub.datasets["org/chats"] = (mix.sources[1].revision, good)
    hub.asked.clear()
    build(tmp_path / "pinned.json", tmp_path / "out", val_min_bytes=1000, max_bytes=SIZE)
    assert not any("org/web" in path for path in hub.asked), "what was done is not read again"


def other_content(hub, mix):
    files = {path: data[:-5] + b"12345" for path, data in hub.datasets["org/web"][1].items()}
    hub.datasets["org/web"] = (mix.sources[0].revision, files)


def other_length(hub, mix):
    files = {path: data + b"more" for path, data in hub.datasets["org/web"][1].items()}
    hub.datasets["org/web"] = (mix.sources[0].revision, files)


FAULTS = {
    "the Hub knows no such revision any more": lambda hub, mix: hub.add("org/web", {"data/train-x.parquet": b"x"}),
    "is not the file that was pinned": other_content,
    "bytes, pinned are": other_length,
    "is not on the Hub, or not for you": lambda hub, mix: hub.datasets.pop("org/web"),
    "asks for consent to its terms": lambda hub, mix: hub.refused.update({"org/web": (403, "GatedRepo")}),
    "cannot be had": lambda hub, mix: hub.refused.update({"org/web": (500, "")}),
    "is refused": lambda hub, mix: hub.refused.update({"org/web": (418, "")}),
    "cannot be had: ": lambda hub, mix: hub.cut.update({file.path: 100 for file in mix.sources[0].pinned}),
}


@pytest.mark.parametrize("message", FAULTS)
def test_what_the_hub_does_not_give_is_said_in_one_line(message, hub, unpinned, tmp_path):
    mix = pin(unpinned, tmp_path / "pinned.json")
    FAULTS[message](hub, mix)
    with pytest.raises(UserError, match=message) as refused:
        build(tmp_path / "pinned.json", tmp_path / "out", val_min_bytes=1000, max_bytes=SIZE)
    assert "\n" not in str(refused.value) and "source web" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_pinning_that_cannot_be(hub, unpinned, tmp_path, monkeypatch, capsys):
    def refused(*words):
        with pytest.raises(SystemExit) as end:
            pin(unpinned, tmp_path / "out.json", *words)
        assert end.value.code == 2 and not (tmp_path / "out.json").exists()
        return capsys.readouterr().err

    assert "--tokens and --bytes are two sizes" in refused("--tokens", "5", "--bytes", "5")
    hub.add("org/web", {"README.md": b"x", "test.parquet": b"y"})
    assert "has no data file 'data/*.parquet' for default" in refused()
    hub.datasets.pop("org/web")
    assert "source web: org/web is not on the Hub, or not for you" in refused()
    monkeypatch.setenv("HF_ENDPOINT", f"file:{tmp_path / 'nowhere'}")
    assert "which is no folder" in refused()
    (tmp_path / "nowhere").mkdir()
    assert "holds 0 revisions of web" in refused()
    write_mirror(tmp_path / "nowhere", pair_of_datasets(), "main")
    assert "holds no folder main, a commit" in refused()


def test_a_source_with_too_little_text_is_said(hub, unpinned, tmp_path):
    pin(unpinned, tmp_path / "pinned.json")
    with pytest.raises(UserError, match=r"the files of source web hold .* MB of usable text, 7\.50 MB are wanted"):
        build(tmp_path / "pinned.json", tmp_path / "out", max_bytes=10**7)


def test_an_unpinned_mix_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"names no revision and files of fineweb-edu, .*data mix pin frontier_v1"):
        build("frontier_v1", tmp_path / "out", max_bytes=10**6)


def test_the_advice_about_an_unpinned_mix_works_to_the_letter(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mix = pair_of_sources(revision=None)
    mix = dataclasses.replace(mix, sources=(mix.sources[0], dataclasses.replace(mix.sources[1], revision=None)))
    monkeypatch.setitem(MIXES, "frontier_v1", dataclasses.replace(mix, name="frontier_v1"))
    with pytest.raises(UserError) as refused:
        build("frontier_v1", tmp_path / "out")
    main(re.search(r"`cognica-poe (.*?)`", str(refused.value))[1].split())
    with pytest.raises(UserError, match="pass --max-bytes"):
        build("mix.json", tmp_path / "out")
    recipe = dataclasses.replace(RECIPES["3b"].data, mix="mix.json", max_bytes=SIZE, val_min_bytes=1000)
    recipe = dataclasses.replace(RECIPES["tiny"], data=dataclasses.replace(recipe, tokenizer_bytes=100_000))
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, vocab_size=300))
    pipeline.prepare(recipe, tmp_path / "run", lambda line: None)
    assert load_manifest(tmp_path / "run" / "data").mix == "frontier_v1"


def test_an_interrupted_pin_leaves_no_file(hub, unpinned, tmp_path):
    hub.refused["org/chats"] = (403, "GatedRepo")
    with pytest.raises(SystemExit):
        pin(unpinned, tmp_path / "pinned.json")
    assert not (tmp_path / "pinned.json").exists()


def test_a_revision_that_is_given_is_kept(hub, tmp_path):
    commit = hub.datasets["org/web"][0]
    mix = pair_of_sources(revision=commit)
    chats = dataclasses.replace(mix.sources[1], revision=None)
    save_mix(dataclasses.replace(mix, sources=(mix.sources[0], chats)), tmp_path / "mix.json")
    assert pin(tmp_path / "mix.json", tmp_path / "pinned.json").sources[0].revision == commit
    save_mix(dataclasses.replace(mix, sources=(pair_of_sources(revision=PIN).sources[0], chats)), tmp_path / "mix.json")
    with pytest.raises(SystemExit):
        pin(tmp_path / "mix.json", tmp_path / "other.json")


def test_show_as_json(capsys):
    main(["data", "mix", "show", "frontier_v1", "--tokens", "1000000", "--json"])

    said = json.loads(capsys.readouterr().out)
    assert len(said["sources"]) == 11 and said["sources"][0]["bytes"] == 0.335e6 * 4.38
