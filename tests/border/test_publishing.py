"""Publishing touches what we wrote on the Hub and nothing else, whatever stands there."""

import json
import shutil

import pytest

from cognica_poe.errors import UserError
from cognica_poe.files import MANIFEST, Manifest, sha256_file, write_manifest
from cognica_poe.release.export import check_release
from cognica_poe.release.publish.revisions import publish
from tests.release.conftest import *  # noqa: F403  # the releases
from tests.release.publish.test_publish_remote import REPO, _files, online  # noqa: F401

FOREIGN = {
    "README.md": b"# by hand\n", "model.Q4_K_M.gguf": b"GGUF" + bytes(100), "images/loss.png": b"\x89PNG",
    "extra.safetensors": b"somebody's adapter", "deep/er/notes.txt": b"mine", ".gitattributes": b"*.gguf filter=lfs\n",
    "Übersicht.md": b"mine", "two words": b"mine", "step-0": b"mine", "models.safetensors.index.json": b"{}",
}  # fmt: skip
"""What somebody has in ``main``; the README alone has the name of a file of ours."""
IN_THE_WAY = (
    "README.md", "readme.md", "LICENSE", "License", "config.json", "Config.JSON", "model.safetensors",
    "MANIFEST.sha256", "tokenizer.json/part", "trajectory.jsonl", "modeling_cognica_poe.py", "Readme.MD/x",
)  # fmt: skip


def put(hub, files, branch="main"):
    """Somebody's commit on a branch of the Hub; ``None`` deletes."""
    held = {**hub.commits[hub.branches[branch]], **files}
    hub.branches[branch] = hub.commit({k: v for k, v in held.items() if v is not None}, hub.branches[branch] + "'")


def begin(hub, files):
    """A repository that somebody made before."""
    hub.repo = REPO
    hub.branches["main"] = hub.commit(dict(files), "")


def refusal(*arguments, **options):
    with pytest.raises(UserError) as caught:
        publish(*arguments, **options)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 400, message
    return message


def state(hub):
    return dict(hub.branches), dict(hub.tags), hub.uploaded


def test_what_others_wrote_on_the_hub_stays(online, releases, make_release, tmp_path):  # noqa: F811
    hub = online()
    begin(hub, FOREIGN)
    before = state(hub)
    message = refusal(releases[:2], REPO)
    assert message.startswith(f"README.md of main of {REPO} was not written by cognica-poe")
    assert "--replace" in message and state(hub) == before

    lines = []
    publish(releases[:2], REPO, replace=True, log=lines.append)
    said = [line for line in lines if "replaced" in line]
    assert said == [f"publish: README.md of main of {REPO} is replaced, though not written by cognica-poe"]
    main = hub.commits[hub.branches["main"]]
    assert {name: main[name] for name in FOREIGN if name != "README.md"} == {
        name: data for name, data in FOREIGN.items() if name != "README.md"
    }
    assert main["README.md"].startswith(b"---\nlanguage")
    for release in releases[:2]:  # steps are branches of our own
        step = f"step-{check_release(release).step}"
        assert hub.commits[hub.branches[step]] == {**_files(release), ".gitattributes": FOREIGN[".gitattributes"]}

    put(hub, {"added.bin": b"later"})
    put(hub, {"note.txt": b"on a step"}, "step-0")
    publish(releases, REPO)  # all that is in the way is ours now
    main = hub.commits[hub.branches["main"]]
    assert main["added.bin"] == b"later" and FOREIGN.keys() <= main.keys()
    assert hub.commits[hub.branches["step-0"]]["note.txt"] == b"on a step"
    other = make_release(tmp_path / "other", step=0, seed=9)
    publish([other], REPO, replace=True)
    assert hub.commits[hub.branches["step-0"]] == {
        **_files(other), ".gitattributes": FOREIGN[".gitattributes"], "note.txt": b"on a step",
    }  # fmt: skip
    assert hub.tags["release-step-0"] == hub.branches["step-0"]


def test_every_name_in_the_way_is_refused_and_replaced_alone(online, releases, capsys):  # noqa: F811
    refused = 0
    for name in IN_THE_WAY:
        for branch in ("main", "step-0")[: 1 if name == "trajectory.jsonl" else 2]:  # steps hold no trajectory
            hub = online()
            begin(hub, {".gitattributes": b""})
            hub.branches[branch] = hub.commit({name: b"mine", "keep.me": b"mine"}, branch)
            before = state(hub)
            message = refusal([releases[0]], REPO)
            assert message.startswith(f"{name} of {branch} of {REPO} "), message
            assert state(hub) == before and not [call for call in hub.writes if "repos/create" not in call]
            refused += 1
            lines = []
            publish([releases[0]], REPO, replace=True, log=lines.append)
            held = hub.commits[hub.branches[branch]]
            assert held["keep.me"] == b"mine" and (name not in held or held[name] != b"mine")
            assert [line for line in lines if "replaced" in line] == [
                f"publish: {name} of {branch} of {REPO} is replaced, though not written by cognica-poe"
            ]
    with capsys.disabled():
        print(f"\npublishing, names in the way: {refused} tried and refused, each replaced alone with --replace")


def test_a_file_of_ours_that_somebody_changed_is_theirs(online, releases):  # noqa: F811
    hub = online()
    publish(releases[:2], REPO)
    for branch, name in (
        ("main", "README.md"),
        ("main", "model.safetensors"),
        ("step-0", "LICENSE"),
        ("main", MANIFEST),
    ):
        good = hub.branches[branch]
        put(hub, {name: b"better words"}, branch)
        message = refusal(releases, REPO)
        assert name in message and f" of {branch} of {REPO} was not written" in message
        assert hub.commits[hub.branches[branch]][name] == b"better words" and "step-300" not in hub.branches
        hub.branches[branch] = good
    put(hub, {"README.md": None})  # gone is nobody's
    publish(releases, REPO)
    assert "README.md" in hub.commits[hub.branches["main"]]


def test_files_of_an_older_release_go_when_the_new_one_has_them_no_more(online, releases, tmp_path):  # noqa: F811
    hub = online()
    old = shutil.copytree(releases[0], tmp_path / "old")
    (old / "old_notes.txt").write_text("of an older version")
    write_manifest(old, "release")
    publish([old], REPO)
    put(hub, {"theirs.txt": b"mine"})
    assert "old_notes.txt" in hub.commits[hub.branches["main"]]
    publish([releases[0]], REPO, replace=True)
    for branch in ("main", "step-0"):
        assert "old_notes.txt" not in hub.commits[hub.branches[branch]]
    assert "theirs.txt" in hub.commits[hub.branches["main"]]


def test_branches_and_tags_of_other_people(online, releases):  # noqa: F811
    hub = online()
    begin(hub, {"a": b"mine"})
    theirs = hub.commit({"b": b"mine"}, "x")
    hub.branches |= {"step-7": theirs, "dev": theirs, "staging-step-0": theirs, "step-007": theirs}
    hub.tags |= {"v1": theirs, "release-step-0": theirs}
    before = state(hub)
    assert "the tag release-step-0" in refusal([releases[0]], REPO) and state(hub) == before
    hub.tags["step-0"] = hub.tags.pop("release-step-0")
    before = state(hub)
    assert "has a tag step-0" in refusal([releases[0]], REPO) and state(hub) == before
    del hub.tags["step-0"]
    lines = []
    publish([releases[0]], REPO, log=lines.append)
    assert any("step-7" in line and "no release of ours" in line for line in lines)
    assert {name: hub.branches[name] for name in ("step-7", "dev", "staging-step-0", "step-007")} == dict.fromkeys(
        ("step-7", "dev", "staging-step-0", "step-007"), theirs
    )
    assert hub.tags["v1"] == theirs and hub.commits[hub.branches["main"]]["a"] == b"mine"
    assert [
        json.loads(line)["step"] for line in hub.commits[hub.branches["main"]]["trajectory.jsonl"].splitlines()
    ] == [0]


def test_a_commit_in_between_is_not_overwritten(online, releases, monkeypatch):  # noqa: F811
    from huggingface_hub import HfApi

    hub, real = online(), HfApi.create_commit
    publish([releases[0]], REPO)

    def slow(self, *arguments, **options):
        if options.get("revision") == "main":
            put(hub, {"README.md": b"meanwhile"})
        return real(self, *arguments, **options)

    monkeypatch.setattr(HfApi, "create_commit", slow)
    assert "somebody else has committed meanwhile" in refusal(releases[:2], REPO)
    assert hub.commits[hub.branches["main"]]["README.md"] == b"meanwhile"
    monkeypatch.undo()


def test_the_manifest_of_main_lists_ours_alone(online, releases):  # noqa: F811
    hub = online()
    begin(hub, {"theirs.bin": b"mine"})
    publish([releases[0]], REPO)
    main = hub.commits[hub.branches["main"]]
    assert {*Manifest.parse(main[MANIFEST], "").digests, MANIFEST} == main.keys() - {"theirs.bin"}
    assert (
        sha256_file(releases[0] / "model.safetensors")
        == Manifest.parse(main[MANIFEST], "").digests["model.safetensors"]
    )
