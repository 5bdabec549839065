"""A local hub folder: other models and added files stay, damage is repaired, and no name or link leads elsewhere."""

import json
import os
import shutil

import pytest

from cognica_poe import pipeline
from cognica_poe.errors import UserError
from cognica_poe.files import MANIFEST, verify_manifest, write_manifest
from cognica_poe.recipe.named import RECIPES
from cognica_poe.release.publish.hub_folder import HubFolder, resolve_revision
from cognica_poe.release.publish.revisions import publish
from cognica_poe.release.publish.tree import tree_of
from tests.border.names import HOSTILE
from tests.release.conftest import *  # noqa: F403  # the releases
from tests.release.publish.test_publish_remote import REPO, _files, online  # noqa: F401


def refusal(*arguments, **options):
    with pytest.raises(UserError) as caught:
        publish(*arguments, **options)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 400, message
    return message


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
