"""Publishing touches what we wrote and nothing else, on the Hub and in a local hub folder, whatever stands there."""

import json
import os
import shutil

import pytest

from cognica_poe import pipeline
from cognica_poe.errors import UserError
from cognica_poe.files import MANIFEST, Manifest, sha256_file, verify_manifest, write_manifest
from cognica_poe.recipe.named import RECIPES
from cognica_poe.release.export import check_release
from cognica_poe.release.publish.hub_folder import HubFolder, resolve_revision
from cognica_poe.release.publish.revisions import publish
from cognica_poe.release.publish.tree import tree_of
from tests.border.names import HOSTILE
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
        print(
            f"\npublishing, names in the way: {2 * len(IN_THE_WAY)} tried, {refused} refused, the same replaced alone"
        )


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


# ---- a local hub folder ------------------------------------------------------------------------------------------


def listing(folder):
    def content(path):
        return os.readlink(path) if path.is_symlink() else path.is_file() and path.read_bytes()

    return {path.relative_to(folder).as_posix(): content(path) for path in folder.rglob("*")}


def somebodys_cache(folder):
    """A Hub cache with another model, and with a download of the repository before we published there."""
    for model in ("models--other--model", "models--cognica--tiny-poe", "datasets--x--y"):
        base = folder / model
        commit = "a1" * 20
        for part in ("blobs", "refs", f"snapshots/{commit}/images"):
            (base / part).mkdir(parents=True)
        for name, data in {"README.md": b"# by hand", "images/loss.png": b"PNG", "w.gguf": b"GGUF"}.items():
            blob = base / "blobs" / f"{len(data):040x}"
            blob.write_bytes(data)
            up = "../" * (2 + name.count("/"))
            (base / "snapshots" / commit / name).symlink_to(f"{up}blobs/{blob.name}")
        (base / "refs" / "main").write_text(commit)
    (folder / "version.txt").write_text("1")
    return folder


def test_a_cache_of_other_models_stays_as_it_is(releases, tmp_path):
    folder = somebodys_cache(tmp_path / "hub")
    before = listing(folder)
    message = refusal(releases, f"file:{folder}", REPO)
    assert message.startswith(f"README.md of main at file:{folder} was not written by cognica-poe")
    assert {k: v for k, v in listing(folder).items() if v is not False} == {
        k: v for k, v in before.items() if v is not False
    }
    publish(releases, f"file:{folder}", REPO, replace=True)
    main = resolve_revision(folder, REPO)
    assert (main / "w.gguf").read_bytes() == b"GGUF" and (main / "images/loss.png").read_bytes() == b"PNG"
    verify_manifest(main)
    after = listing(folder)
    assert {name: after[name] for name in before if not name.endswith("tiny-poe/refs/main")} == {
        name: data for name, data in before.items() if not name.endswith("tiny-poe/refs/main")
    }
    (main / "notes.txt").write_text("mine")
    publish(releases, f"file:{folder}", REPO)
    assert (resolve_revision(folder, REPO) / "notes.txt").read_text() == "mine"


def test_files_added_to_a_snapshot_stay_and_changed_ones_are_refused(releases, make_release, tmp_path):
    dest = f"file:{tmp_path}"
    publish(releases[:2], dest, REPO)
    step = resolve_revision(tmp_path, REPO, "step-0")
    (step / "mine").mkdir()
    (step / "mine" / "a.txt").write_text("mine")
    publish(releases[:2], dest, REPO)
    other = make_release(tmp_path / "other", step=0, seed=9)
    publish([other], dest, REPO, replace=True)
    assert (resolve_revision(tmp_path, REPO, "step-0") / "mine" / "a.txt").read_text() == "mine"
    readme = resolve_revision(tmp_path, REPO) / "README.md"
    readme.unlink()
    readme.write_text("by hand")
    assert "README.md of main" in refusal([other, *releases[1:]], dest, REPO)
    assert readme.read_text() == "by hand" and "step-300" not in HubFolder(tmp_path, REPO).refs()
    publish([other, *releases[1:]], dest, REPO, replace=True)
    verify_manifest(resolve_revision(tmp_path, REPO))


def damage(hub):
    """Every kind of damage of a local hub, each as (name, act)."""
    snapshot = hub.snapshot(hub.refs()["step-0"])
    for name in ("model.safetensors", "analysis.json", MANIFEST):
        blob = (snapshot / name).resolve()
        yield f"blob of {name} changed", lambda blob=blob: blob.write_bytes(b"rubbish")
        yield f"blob of {name} empty", lambda blob=blob: blob.write_bytes(b"")
        yield f"blob of {name} gone", lambda blob=blob: blob.unlink()
        yield f"{name} gone", lambda name=name: (snapshot / name).unlink()
    yield "snapshot gone", lambda: shutil.rmtree(snapshot)
    yield "snapshot empty", lambda: (shutil.rmtree(snapshot), snapshot.mkdir())
    yield "blobs gone", lambda: shutil.rmtree(hub.base / "blobs")
    yield "snapshots gone", lambda: shutil.rmtree(hub.base / "snapshots")
    for text in ("", "0" * 40, "../../..", "\xff"):
        for ref in ("step-0", "main"):
            yield (
                f"reference {ref} {text!r}",
                lambda ref=ref, text=text: (hub.base / "refs" / ref).write_text(text, "latin1"),
            )
    yield "reference gone", lambda: (hub.base / "refs" / "main").unlink()


def test_a_damaged_hub_is_repaired_by_publishing_again(releases, tmp_path, capsys):
    whole = publish(releases[:2], f"file:{tmp_path / 'hub'}", REPO)
    kinds = list(damage(HubFolder(tmp_path / "hub", REPO)))
    for number in range(len(kinds)):
        folder = shutil.copytree(tmp_path / "hub", tmp_path / str(number), symlinks=True)
        name, act = list(damage(HubFolder(folder, REPO)))[number]
        act()
        assert publish(releases[:2], f"file:{folder}", REPO) == whole.__class__(
            whole.repo_id, f"file:{folder}", whole.revisions, whole.main
        ), name
        hub = HubFolder(folder, REPO)
        for commit in hub.refs().values():
            verify_manifest(hub.snapshot(commit))
        shutil.rmtree(folder)
    with capsys.disabled():
        print(f"\npublishing, damaged hubs: {len(kinds)} tried, {len(kinds)} repaired by publishing again")


def test_links_that_lead_elsewhere_are_not_followed(releases, tmp_path):
    publish(releases[:2], f"file:{tmp_path / 'hub'}", REPO)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "thesis").write_text("years of work")
    for part in ("blobs", "refs", "snapshots"):
        folder = shutil.copytree(tmp_path / "hub", tmp_path / part, symlinks=True)
        base = HubFolder(folder, REPO).base
        shutil.rmtree(base / part)
        (base / part).symlink_to(outside)
        assert "is a link" in refusal(releases, f"file:{folder}", REPO)
    hub = HubFolder(tmp_path / "hub", REPO)
    snapshot = hub.snapshot(hub.refs()["step-0"])
    for name in ("README.md", "analysis.json"):
        (snapshot / name).unlink()
        (snapshot / name).symlink_to(outside / "thesis")
    refusal(releases, f"file:{tmp_path / 'hub'}", REPO)
    shutil.rmtree(snapshot)
    snapshot.symlink_to(outside)
    publish(releases, f"file:{tmp_path / 'hub'}", REPO)
    verify_manifest(hub.snapshot(hub.refs()["step-0"]))
    assert [path.name for path in outside.iterdir()] == ["thesis"] and (
        outside / "thesis"
    ).read_text() == "years of work"


# ---- names and modes ---------------------------------------------------------------------------------------------


def test_hostile_names_are_refused_at_every_entry(releases, tmp_path, online, capsys):  # noqa: F811
    dest, tried = f"file:{tmp_path / 'hub'}", 0
    publish([releases[0]], dest, REPO)
    before = listing(tmp_path)
    hub = HubFolder(tmp_path / "hub", REPO)
    for name in HOSTILE:
        words = name if isinstance(name, str) else str(name)
        entries = [
            lambda name=name: hub.snapshot(name),
            lambda name=name: hub.read(hub.refs()["main"], name),
            lambda name=name: hub.put(name, tree_of(releases[0])),
            lambda name=name: HubFolder(tmp_path / "hub", name),
            lambda words=words: resolve_revision(tmp_path / "hub", REPO, f"../{words}"),
            lambda words=words: publish([releases[0]], dest, words),
            lambda words=words: publish([releases[0]], f"{words}/../x"),
        ]
        for entry in entries:
            with pytest.raises(UserError) as caught:
                entry()
            assert str(caught.value).isprintable(), str(caught.value)
            tried += 1
    assert listing(tmp_path) == before
    broken = shutil.copytree(releases[1], tmp_path / "broken")
    for name in HOSTILE:
        if isinstance(name, str) and "\ud800" not in name:
            lines = (releases[1] / MANIFEST).read_text().splitlines()
            (broken / MANIFEST).write_text("\n".join([*lines[1:-1], f"{'0' * 64}  {name}"]) + "\n")
            refusal([broken], dest, REPO)
            tried += 1
    with capsys.disabled():
        print(f"\npublishing, hostile names: {tried} tried, {tried} refused")


@pytest.mark.parametrize("step", [-1, 1.5, "7", "../7", None, True, [], {}, 10**30, "1e3"], ids=repr)
def test_a_step_is_a_whole_number(releases, tmp_path, step):
    broken = shutil.copytree(releases[1], tmp_path / "broken")
    for name in ("release.json", "analysis.json"):
        described = json.loads((broken / name).read_text())
        (broken / name).write_text(json.dumps({**described, "step": step}))
    write_manifest(broken, "release")
    message = refusal([broken], f"file:{tmp_path / 'hub'}", REPO)
    assert "\n" not in message and not (tmp_path / "hub").exists()


def test_published_files_are_readable_by_all(releases, tmp_path):
    private = shutil.copytree(releases[0], tmp_path / "private")
    for file in private.iterdir():
        file.chmod(0o600)
    publish([private], f"file:{tmp_path / 'hub'}", REPO)
    base = HubFolder(tmp_path / "hub", REPO).base
    assert {oct(path.stat().st_mode & 0o777) for path in base.rglob("*") if path.is_file()} == {"0o644"}
    assert {oct(file.stat().st_mode & 0o777) for file in releases[0].iterdir()} == {"0o644"}


def test_a_file_that_may_not_be_read_is_named(releases, tmp_path, monkeypatch):
    def open_denied(file, *arguments, **options):
        if str(file).endswith("model.safetensors"):
            raise PermissionError(13, "Permission denied", str(file))
        return real(file, *arguments, **options)

    real = open
    monkeypatch.setattr("cognica_poe.files.open", open_denied, raising=False)
    message = refusal(releases, f"file:{tmp_path / 'hub'}", REPO)
    assert "model.safetensors may not be read" in message and "\n" not in message


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


def test_of_steps_with_equal_weights_the_first_is_published(make_release, tmp_path):
    for step, seed in ((6, 1), (12, 1), (100, 2)):
        make_release(tmp_path / "run" / "release" / f"step-{step}", step=step, seed=seed)
    for to in (None, f"file:{tmp_path / 'elsewhere'}"):
        lines = []
        steps = pipeline.exported_steps(tmp_path / "run")
        assert steps == [6, 12, 100]
        done = pipeline.publish_run(tmp_path / "run", RECIPES["tiny"], steps, lines.append, to)
        assert sorted(done.revisions) == [6, 100]
        assert "step 12 is not published: it holds the weights of step-6" in lines
    (tmp_path / "run" / "release" / "step-x").mkdir()
    with pytest.raises(UserError, match="is of no step"):
        pipeline.exported_steps(tmp_path / "run")
