"""Publishing to a Hub: a server on this machine stands for it, and fails at every request in turn."""

import json
import shutil

import pytest

from cognica_poe.errors import UserError
from cognica_poe.release.export import check_release
from cognica_poe.release.publish.revisions import publish
from cognica_poe.release.publish.tree import tree_of
from tests.release.publish.fake_hub import TOKEN, FakeHub

REPO = "cognica/tiny-poe"


@pytest.fixture
def online(monkeypatch):
    """``online(hub)``: point the client at ``hub``."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    hubs = []

    def start():
        hubs.append(FakeHub())
        monkeypatch.setenv("HF_ENDPOINT", hubs[-1].url)
        return hubs[-1]

    yield start
    for hub in hubs:
        hub.close()


def _files(release):
    return {name: path.read_bytes() for name, path in tree_of(release).items()}


def _check(hub, releases):
    steps = {f"step-{check_release(release).step}": release for release in releases}
    assert set(hub.branches) == {"main", *steps}, "no staging branch stays"
    assert hub.tags == {f"release-{name}": hub.branches[name] for name in steps}
    for name, release in steps.items():
        held = dict(hub.commits[hub.branches[name]])
        held.pop(".gitattributes")
        assert held == _files(release)
    main = hub.commits[hub.branches["main"]]
    lines = [json.loads(line) for line in main["trajectory.jsonl"].decode().splitlines()]
    assert {line["revision"]: line["commit"] for line in lines} == {name: hub.branches[name] for name in steps}
    assert main["model.safetensors"] == _files(releases[-1])["model.safetensors"]


def test_steps_become_branches_and_tags_and_main_the_latest(online, releases):
    hub = online()
    publication = publish(releases, REPO)
    _check(hub, releases)
    assert publication.revisions[300] == hub.branches["step-300"]
    assert hub.uploaded == sum((release / "model.safetensors").stat().st_size for release in releases)


def test_a_published_revision_downloads_into_what_was_released(online, releases, tmp_path):
    from huggingface_hub import snapshot_download

    hub = online()
    publish(releases, REPO)
    folder = snapshot_download(REPO, revision="step-100", local_dir=tmp_path / "down", endpoint=hub.url)
    for name, data in _files(releases[1]).items():
        assert (tmp_path / "down" / name).read_bytes() == data
    shutil.rmtree(tmp_path / "down" / ".cache")
    (tmp_path / "down" / ".gitattributes").unlink()
    assert check_release(tmp_path / "down").step == 100 and folder


def test_publishing_again_uploads_nothing(online, releases):
    hub = online()
    first = publish(releases, REPO)
    writes, uploaded, branches = len(hub.writes), hub.uploaded, dict(hub.branches)
    assert publish(releases, REPO) == first
    assert hub.uploaded == uploaded and hub.branches == branches
    assert [call for call in hub.writes[writes:] if "repos/create" not in call] == []


def test_an_earlier_step_later_leaves_main_at_the_latest(online, releases):
    hub = online()
    publish([releases[2]], REPO)
    publish([releases[0]], REPO)
    _check(hub, [releases[0], releases[2]])


@pytest.mark.parametrize("after", [False, True], ids=["refused", "answer-lost"])
def test_a_failure_at_any_request_is_made_good_by_repeating(online, releases, after):
    whole = online()
    publish([releases[0]], REPO)
    total = len(whole.writes)
    assert total > 8
    for index in range(total):
        hub = online()
        hub.fail_at, hub.fail_after = index, after
        with pytest.raises(UserError, match=r"HF_TOKEN|answered 422") as caught:
            publish([releases[0]], REPO)
        assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
        for name in set(hub.branches) & {"step-0"}:
            assert _files(releases[0]).items() <= hub.commits[hub.branches[name]].items(), "never half a revision"
        publish([releases[0]], REPO)
        _check(hub, [releases[0]])


def test_a_file_that_arrives_damaged_never_gets_a_revision(online, releases):
    hub = online()
    hub.corrupt = "config.json"
    with pytest.raises(UserError, match=r"config\.json arrived at .* with another checksum"):
        publish([releases[0]], REPO)
    assert "step-0" not in hub.branches and not hub.tags
    hub.corrupt = None
    publish([releases[0]], REPO)
    _check(hub, [releases[0]])


def test_a_published_step_stays_unless_replaced(online, make_release, releases, tmp_path):
    hub = online()
    publish(releases[:2], REPO)
    other = make_release(tmp_path / "other", step=100, seed=77)
    with pytest.raises(UserError, match="published with other content"):
        publish([other], REPO)
    publish([other], REPO, replace=True)
    _check(hub, [releases[0], other])


def test_equal_weights_are_refused_across_calls(online, make_release, releases, tmp_path):
    online()
    publish([releases[0]], REPO)
    twin = make_release(tmp_path / "twin", step=5, seed=0)
    with pytest.raises(UserError, match="step-0 and step-5 hold the same weights"):
        publish([twin], REPO)


def test_no_token_no_network_bad_token_are_told(online, releases, monkeypatch):
    from huggingface_hub import constants

    online()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match="token in HF_TOKEN is not valid"):
        publish(releases, REPO)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="no Hugging Face token: set HF_TOKEN"):
        publish(releases, REPO)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UserError, match="no connection to the Hub"):
        publish(releases, REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        publish(releases, REPO)
