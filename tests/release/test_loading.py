"""Loading: a folder, or a revision of a Hub cache folder; what is not there is named."""

import re
import shutil

import pytest
import torch

import cognica_poe
from cognica_poe.errors import UserError
from cognica_poe.release.publish.revisions import publish
from tests.release.conftest import release_model

REPO = "cognica/tiny-poe"


def same(model, seed: int) -> bool:
    expected = release_model(seed).state_dict()
    return all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_a_folder(releases):
    model, tokenizer = cognica_poe.load(str(releases[2]))
    assert same(model, 300) and not model.training
    assert tokenizer("the cat").input_ids[0] == tokenizer.bos_token_id


def test_revisions_of_a_hub_cache_folder(releases, tmp_path):
    publish(releases, f"file:{tmp_path}", REPO)
    assert same(cognica_poe.load(REPO, "step-100", tmp_path)[0], 100)
    assert same(cognica_poe.load(REPO, cache_dir=tmp_path)[0], 300)  # main is the newest
    with pytest.raises(UserError, match="has no revision 'step-7'"):
        cognica_poe.load(REPO, "step-7", tmp_path)


def test_files_of_others_beside_a_release(releases, tmp_path):
    """A picture or a GGUF in a repository changes nothing; what a loader would read is refused."""
    folder = tmp_path / "mine"
    shutil.copytree(releases[2], folder)
    (folder / "model-Q4.gguf").write_bytes(b"GGUF")
    (folder / "pictures").mkdir()
    (folder / "pictures" / "curve.png").write_bytes(b"png")
    assert same(cognica_poe.load(folder)[0], 300)
    for name in ("adapter_config.json", "model-00001-of-00002.safetensors", "chat_template.jinja", "tool.py"):
        (folder / name).write_text("{}")
        with pytest.raises(UserError, match=rf"{re.escape(name)} is not in MANIFEST.sha256: a loader might read it"):
            cognica_poe.load(folder)
        (folder / name).unlink()


def test_mistakes(releases, tmp_path):
    with pytest.raises(UserError, match=r"no release folder .*nothing: pass the path"):
        cognica_poe.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="is a folder, which has no revision step-100"):
        cognica_poe.load(releases[0], "step-100")
