"""A tiny tokenizer and release folders made from the shared test model."""

import hashlib
from pathlib import Path

import pytest
import torch

from cognica_poe.analysis.analyzer import weights_sha256
from cognica_poe.data.tokenizer import train_tokenizer
from cognica_poe.release.export import export_release
from tests.conftest import make_model
from tests.release.records import RELEASE, make_record

VOCAB = 280
BOUNDS = [3.25, 1.5]


def record_of(model, step: int) -> dict:
    """A valid record of these very weights."""
    record = make_record(step, stages=3)
    record["model"]["weights_sha256"] = weights_sha256(model)
    return record


def release_model(seed: int = 0, dtype=torch.float32):
    """The shared test model with the vocabulary of the test tokenizer."""
    return make_model(seed, dtype, vocab_size=VOCAB)


def add_line(manifest: Path, line: str) -> None:
    """Add a line to a manifest and seal it again, as somebody with bad intent would."""
    body = manifest.read_bytes().partition(b"# sha256 ")[0] + f"{line}\n".encode()
    manifest.write_bytes(body + f"# sha256 {hashlib.sha256(body).hexdigest()}\n".encode())


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    train_tokenizer(["the cat sat on the mat and the dog ran to the cat " * 20], VOCAB, folder)
    return folder


@pytest.fixture(scope="session")
def make_release(tokenizer_dir):
    """``make_release(out, step, seed, **changes)``: a release folder."""

    def make(out, step=300, seed=0, model=None, **changes):
        model = model or release_model(seed)
        arguments = {
            "record": record_of(model, step),
            "wand_bounds": BOUNDS,
            "name": "tiny-poe",
            "repo_id": "cognica/tiny-poe",
            "step": step,
            "about": {key: RELEASE[key] for key in ("license", "languages", "data")},
        }
        return export_release(model, tokenizer_dir, out, **(arguments | changes))

    return make


@pytest.fixture(scope="session")
def releases(make_release, tmp_path_factory):
    """Three releases of one run; do not alter."""
    folder = tmp_path_factory.mktemp("releases")
    return [make_release(folder / f"step-{step}", step=step, seed=step) for step in (0, 100, 300)]
