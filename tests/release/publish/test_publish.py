"""Publishing to a local Hub folder: what lands there loads offline, once, complete and never half."""

import hashlib
import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cognica_poe.errors import UserError
from cognica_poe.files import MANIFEST, Manifest, sha256_file, verify_manifest, write_manifest
from cognica_poe.leftovers import PREFIX
from cognica_poe.release.export import check_release
from cognica_poe.release.publish import hub_folder
from cognica_poe.release.publish.clean_load import logits_in_clean_process
from cognica_poe.release.publish.hub_folder import HubFolder, resolve_revision
from cognica_poe.release.publish.revisions import publish
from cognica_poe.release.publish.tree import content_id, tree_of
from tests.release.conftest import add_line, release_model

REPO = "cognica/tiny-poe"
IDS = [271, 4, 9, 16, 25, 36]


@pytest.fixture(scope="module")
def hub(releases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    return folder, publish(releases, f"file:{folder}", REPO)


def _listing(folder):
    return sorted((path.relative_to(folder).as_posix(), path.lstat().st_ino) for path in folder.rglob("*"))


def test_every_revision_loads_offline_through_the_auto_classes(hub, monkeypatch, tmp_path):
    folder, _ = hub
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    for step in (0, 300):
        where = {"revision": f"step-{step}", "cache_dir": str(folder), "local_files_only": True}
        loaded = AutoModelForCausalLM.from_pretrained(REPO, trust_remote_code=True, **where).eval()
        assert type(loaded).__module__.startswith("transformers_modules.cognica")
        tokenizer = AutoTokenizer.from_pretrained(REPO, **where)
        assert tokenizer("the cat").input_ids[0] == 271
        with torch.no_grad():
            expected = release_model(step)(input_ids=torch.tensor([IDS])).logits
            assert torch.equal(loaded(input_ids=torch.tensor([IDS])).logits, expected)
    newest = AutoConfig.from_pretrained(REPO, trust_remote_code=True, cache_dir=str(folder), local_files_only=True)
    assert newest.poe_wand_p99_bounds_per_stage_head == [3.25, 1.5]


def test_main_loads_in_a_clean_offline_process_and_is_the_latest_step(hub):
    folder, _ = hub
    with torch.no_grad():
        expected = release_model(300)(input_ids=torch.tensor([IDS])).logits
    assert torch.equal(logits_in_clean_process(REPO, IDS, revision="main", cache_dir=folder), expected)


def test_layout_is_that_of_a_hub_cache(hub, releases):
    folder, publication = hub
    base = folder / "models--cognica--tiny-poe"
    assert {file.name for file in (base / "refs").iterdir()} == {"main", "step-0", "step-100", "step-300"}
    assert sorted(publication.revisions) == [0, 100, 300]
    for step, commit in publication.revisions.items():
        assert len(commit) == 40 and (base / "refs" / f"step-{step}").read_text() == commit
        snapshot = base / "snapshots" / commit
        verify_manifest(snapshot)
        assert all(file.is_symlink() and not file.readlink().is_absolute() for file in snapshot.iterdir())
    for blob in (base / "blobs").iterdir():
        assert blob.name == sha256_file(blob)
    weights = {
        (base / "snapshots" / commit / "model.safetensors").resolve() for commit in publication.revisions.values()
    }
    code = {
        (base / "snapshots" / commit / "modeling_cognica_poe.py").resolve() for commit in publication.revisions.values()
    }
    assert len(weights) == 3 and len(code) == 1, "weights differ, the code is stored once"


def test_trajectory_and_card_of_main_tell_of_every_revision(hub, releases):
    folder, publication = hub
    main = resolve_revision(folder, REPO)
    verify_manifest(main)
    lines = [json.loads(line) for line in (main / "trajectory.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 100, 300]
    for line, release in zip(lines, map(check_release, releases), strict=True):
        assert line["commit"] == publication.revisions[line["step"]]
        assert line["weights_sha256"] == release.weights_sha256
        assert line["bpb"] == release.record["bpb"]["full"]
    card = (main / "README.md").read_text()
    assert all(commit[:12] in card for commit in publication.revisions.values())
    assert f'"{publication.revisions[300]}"' in card, "the loading example pins the commit"


def test_commit_ids_come_from_the_content(hub, releases, tmp_path):
    _, publication = hub
    again = publish(releases[::-1], f"file:{tmp_path}", REPO)
    assert again.revisions == publication.revisions and again.main == publication.main


def test_publishing_again_changes_nothing(hub, releases):
    folder, publication = hub
    before = _listing(folder)
    assert publish(releases, f"file:{folder}", REPO) == publication
    assert _listing(folder) == before


def test_a_later_step_moves_main_and_an_earlier_one_does_not(releases, tmp_path):
    dest = f"file:{tmp_path}"
    publish([releases[0]], dest, REPO)
    publish([releases[2]], dest, REPO)
    third = publish([releases[1]], dest, REPO)
    assert sorted(third.revisions) == [0, 100, 300]
    main = resolve_revision(tmp_path, REPO)
    assert check_release_step(main) == 300
    assert len((main / "trajectory.jsonl").read_text().splitlines()) == 3
    assert third.main == publish(releases, dest, REPO).main


def check_release_step(folder):
    return json.loads((folder / "analysis.json").read_text())["step"]


def test_a_killed_publication_leaves_no_half_revision_and_is_finished_by_the_next(hub, releases, tmp_path, monkeypatch):
    _, publication = hub
    calls = 0
    real = hub_folder.write_bytes

    def dies(path, data):
        nonlocal calls
        calls += 1
        if calls > limit:
            raise KeyboardInterrupt
        real(path, data)

    for limit in (0, 1, 2, 3, 4):
        folder, calls = tmp_path / str(limit), 0
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(hub_folder, "write_bytes", dies)
            publish(releases, f"file:{folder}", REPO)
        hub_now = HubFolder(folder, REPO)
        for name, commit in hub_now.refs().items():
            verify_manifest(hub_now.snapshot(commit))
            assert name in ("main", "step-0", "step-100", "step-300")
        (hub_now.base / "blobs" / f"{PREFIX}left").write_text("x")
        assert publish(releases, f"file:{folder}", REPO).revisions == publication.revisions
        assert not list(hub_now.base.rglob(".partial-*"))


def test_a_damaged_blob_is_put_right_by_publishing_again(releases, tmp_path):
    first = publish(releases, f"file:{tmp_path}", REPO)
    weights = resolve_revision(tmp_path, REPO, "step-100") / "model.safetensors"
    weights.resolve().write_bytes(b"rubbish")
    assert publish(releases, f"file:{tmp_path}", REPO) == first
    assert sha256_file(weights) == check_release(releases[1]).weights_sha256


def test_two_steps_with_the_same_weights_are_refused(make_release, releases, tmp_path):
    twin = make_release(tmp_path / "twin", step=400, seed=300)
    with pytest.raises(UserError, match="step-300 and step-400 hold the same weights"):
        publish([*releases, twin], f"file:{tmp_path / 'hub'}", REPO)
    publish(releases, f"file:{tmp_path / 'hub'}", REPO)
    with pytest.raises(UserError, match="step-300 and step-400 hold the same weights"):
        publish([twin], f"file:{tmp_path / 'hub'}", REPO)


def test_a_published_step_stays_unless_replaced(make_release, releases, tmp_path):
    dest = f"file:{tmp_path / 'hub'}"
    first = publish(releases, dest, REPO)
    other = make_release(tmp_path / "other", step=100, seed=77)
    with pytest.raises(UserError, match="published with other content"):
        publish([other], dest, REPO)
    second = publish([other], dest, REPO, replace=True)
    assert second.revisions[100] != first.revisions[100] and second.revisions[300] == first.revisions[300]
    line = json.loads((resolve_revision(tmp_path / "hub", REPO) / "trajectory.jsonl").read_text().splitlines()[1])
    assert line["commit"] == second.revisions[100]


def test_code_that_differs_between_steps_is_refused(releases, tmp_path):
    changed = shutil.copytree(releases[1], tmp_path / "changed")
    code = changed / "modeling_cognica_poe.py"
    code.write_text(code.read_text() + "# changed\n")
    write_manifest(changed, "release")
    with pytest.raises(UserError, match="model code of step-100 is not that of step-0"):
        publish([releases[0], changed], f"file:{tmp_path / 'hub'}", REPO)


def _forge(hub: HubFolder, ref: str, name: str, content: bytes) -> None:
    """Point ``ref`` at a revision made by somebody else, whose manifest lists ``name`` too."""
    made = hub.base / "snapshots" / "made"
    shutil.copytree(hub.snapshot(hub.refs()[ref]), made)
    add_line(made / MANIFEST, f"{hashlib.sha256(content).hexdigest()}  {name}")
    commit = content_id((made / MANIFEST).read_bytes())
    forged = made.rename(hub.snapshot(commit))
    (forged / name).resolve().parent.mkdir(parents=True, exist_ok=True)
    (forged / name).write_bytes(content)
    (hub.base / "refs" / ref).write_text(commit)


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at % len(data)] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", [MANIFEST, "analysis.json", "reference"])
def test_a_damaged_revision_is_named_and_publishing_its_step_again_repairs_it(releases, tmp_path, name):
    dest, lines = f"file:{tmp_path / 'hub'}", []
    done = publish(releases[:2], dest, REPO)
    hub = HubFolder(tmp_path / "hub", REPO)
    file = hub.base / "refs" / "step-0" if name == "reference" else hub.snapshot(done.revisions[0]) / name
    before = file.read_bytes()
    for at in (0, len(before) // 2, -1):
        if name == "reference":
            file.write_bytes(b"%040x" % at if at >= 0 else before[::-1])
        else:
            flip(file, at)
        with pytest.raises(UserError, match=f"{hub.base}.*publish that step again"):
            publish(releases[2:], dest, REPO)
        assert publish(releases[:2], dest, REPO, log=lines.append).revisions == done.revisions
        assert any("step-0 is stored again" in line for line in lines) and file.read_bytes() == before
    assert json.loads(hub.read(done.revisions[0], "analysis.json"))["step"] == 0


@pytest.mark.parametrize("name", ["../../x", "../../../../escaped", "sub/x", "a\\b"])
def test_names_in_a_manifest_of_somebody_else_lead_nowhere(releases, tmp_path, monkeypatch, name):
    dest = f"file:{tmp_path / 'hub'}"
    publish([releases[0], releases[2]], dest, REPO)
    _forge(HubFolder(tmp_path / "hub", REPO), "step-300", name, b"somebody else's")
    scratch = tmp_path / "scratch" / "deep"
    scratch.mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    with pytest.raises(UserError, match="cannot be used as a name on disk"):
        publish([releases[1]], dest, REPO)  # main is made from the files of step 300 on the hub
    assert [path for path in (tmp_path / "scratch").rglob("*") if path != scratch] == []


@pytest.mark.parametrize("commit", ["../../..", "/etc", "..", "", "a/b", "a\nb", "x" * 300])
def test_a_reference_that_leads_elsewhere_is_refused(releases, tmp_path, commit):
    dest = f"file:{tmp_path / 'hub'}"
    publish([releases[0]], dest, REPO)
    hub = HubFolder(tmp_path / "hub", REPO)
    (hub.base / "refs" / "step-0").write_text(commit)
    for call in (
        lambda: publish([releases[1]], dest, REPO),
        lambda: resolve_revision(tmp_path / "hub", REPO, "step-0"),
    ):
        with pytest.raises(UserError, match=r"step-0: commit .* cannot be used as a name"):
            call()


@pytest.mark.parametrize("name", ["../../..", "/etc", "..", "a/../../b", "a\\b", "nul\0"])
def test_names_from_the_command_line_lead_nowhere(hub, name):
    folder, publication = hub
    place, commit = HubFolder(folder, REPO), publication.main
    calls = {
        "revision": lambda: resolve_revision(folder, REPO, name),
        "repository id": lambda: resolve_revision(folder, name),
        "file name": lambda: place.read(commit, name),
        "reference": lambda: place.put(name, tree_of(place.snapshot(commit))),
    }
    before = _listing(folder)
    for what, call in calls.items():
        with pytest.raises(UserError, match=f"^{what} .* cannot be used as a name"):
            call()
    assert _listing(folder) == before


def test_snapshots_carry_the_mark(hub):
    folder, publication = hub
    for commit in (publication.main, *publication.revisions.values()):
        snapshot = HubFolder(folder, REPO).snapshot(commit)
        manifest = Manifest.read(snapshot)
        assert manifest.kind == "release" and {*manifest.digests, MANIFEST} == {
            file.name for file in snapshot.iterdir()
        }


def test_mistakes_are_told_in_one_line(releases, tmp_path):
    cases = {
        "nothing to publish": ([], f"file:{tmp_path}", REPO),
        "both of step 100": ([releases[1], shutil.copytree(releases[1], tmp_path / "b")], f"file:{tmp_path}", REPO),
        "names no folder": (releases, "file:", REPO),
        "no repository id": (releases, f"file:{tmp_path}", "tiny"),
        "cannot publish to 'tiny'": (releases, "tiny", None),
        "release folder not found": ([tmp_path / "none"], f"file:{tmp_path}", REPO),
    }
    for message, arguments in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            publish(*arguments)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="has no revision 'step-7'; published there: none"):
        resolve_revision(tmp_path, REPO, "step-7")


def test_a_faulty_release_is_not_published(releases, tmp_path):
    broken = shutil.copytree(releases[1], tmp_path / "broken")
    (broken / MANIFEST).unlink()
    with pytest.raises(UserError, match="has no MANIFEST"):
        publish([releases[0], broken], f"file:{tmp_path / 'hub'}", REPO)
    assert not (tmp_path / "hub").exists()
