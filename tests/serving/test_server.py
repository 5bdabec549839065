"""The server: transformers' own answers through the modes of this model."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from transformers import AutoTokenizer

from cognica_poe.data.tokenizer import train_tokenizer
from cognica_poe.errors import UserError
from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM
from cognica_poe.release.export import export_release
from cognica_poe.serving.options import ServerOptions
from cognica_poe.serving.server import generation_defaults, serve
from tests.conftest import make_model
from tests.release.conftest import BOUNDS, record_of

TEXT = "the cat sat on the mat and the dog sat on the log; "


@pytest.fixture
def folder(tmp_path):
    """A release."""
    tokenizer = train_tokenizer([TEXT * 20], 275, tmp_path / "tokenizer")
    model = make_model(dtype=torch.float32, vocab_size=tokenizer.vocab_size)
    settings = {"record": record_of(model, 300), "wand_bounds": BOUNDS, "name": "tiny", "step": 300}
    return export_release(model, tokenizer.folder, tmp_path / "release", **settings)


def ask(port: int, path: str, **body) -> dict:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(f"http://localhost:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@pytest.fixture
def start(folder):
    """Starts the server with arguments and returns its port."""
    servers = []

    def run(*arguments: str) -> int:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        command = [
            sys.executable,
            "-m",
            "cognica_poe.cli.main",
            "serve",
            str(folder),
            "--port",
            str(port),
            "--device",
            "cpu",
        ]
        servers.append(subprocess.Popen([*command, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"}))
        for _ in range(240):
            time.sleep(0.5)
            assert servers[-1].poll() is None, "the server ended"
            try:
                return ask(port, "/health") and port
            except OSError:
                continue
        raise AssertionError("the server does not answer")

    yield run
    for server in servers:
        server.terminate()
        server.wait(30)


def test_answers_are_those_of_the_mode(start, folder):
    pytest.importorskip("fastapi")
    port = start("--mode", "stage")
    answer = ask(port, "/v1/completions", model=str(folder), prompt="the cat", max_tokens=12, temperature=0)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), CognicaPoEForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    by_stage, by_pool = (model.generate_stage(ids, 0, max_new_tokens=12), model.generate_prefix(ids, max_new_tokens=12))
    assert not torch.equal(by_stage, by_pool)
    assert answer["choices"][0]["text"] == tokenizer.decode(by_stage[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_mode_brings_its_own_options_and_no_others():
    assert generation_defaults(ServerOptions()) == {}
    assert generation_defaults(ServerOptions("wand")) == {"poe_mode": "wand", "poe_options": {}}
    assert generation_defaults(ServerOptions("prefix", stages=2))["poe_options"] == {"max_stages": 2}
    options = generation_defaults(ServerOptions("speculative", stage=1, drafter="int8", k_draft=3))["poe_options"]
    assert options == {"draft_stage": 1, "drafter": "int8", "k_draft": 3}


def test_mistakes(tmp_path, folder, monkeypatch):
    with pytest.raises(UserError, match="release folder not found"):
        serve(tmp_path / "nothing", ServerOptions(), print)
    weights = folder / "model.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(UserError, match=r"model\.safetensors is corrupt"):
        serve(folder, ServerOptions(), print)
    weights.write_bytes(sound)
    with pytest.raises(UserError, match="--k-draft is 0"):
        serve(folder, ServerOptions("speculative", k_draft=0), print)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'cognica-poe\[serve\]'"):
        serve(folder, ServerOptions(), print)
