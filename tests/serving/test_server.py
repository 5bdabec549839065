"""The command that serves: a process of its own, its mode, its mistakes, its end."""

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

from cognica_poe.errors import UserError
from cognica_poe.modeling.modeling_cognica_poe import CognicaPoEForCausalLM
from cognica_poe.serving.options import ServerOptions
from cognica_poe.serving.server import load_answering, serve


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

    run.servers = servers
    yield run
    for server in servers:
        server.terminate()
        server.wait(30)


def test_answers_are_those_of_the_mode(start, folder):
    pytest.importorskip("fastapi")
    port = start("--mode", "stage")
    answer = ask(port, "/v1/completions", model=folder.name, prompt="the cat", max_tokens=12, temperature=0)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), CognicaPoEForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    by_stage, by_pool = (model.generate_stage(ids, 0, max_new_tokens=12), model.generate_prefix(ids, max_new_tokens=12))
    assert not torch.equal(by_stage, by_pool)
    assert answer["choices"][0]["text"] == tokenizer.decode(by_stage[0, ids.shape[1] :], skip_special_tokens=True)


def test_it_ends_when_told_and_finishes_what_it_began(start, folder):
    pytest.importorskip("fastapi")
    port = start()
    server = start.servers[-1]
    ask(port, "/v1/completions", model=folder.name, prompt="the cat", max_tokens=2)
    server.terminate()
    assert server.wait(30) in (143, -15)


def test_an_address_that_is_taken(folder):
    pytest.importorskip("uvicorn")
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        with pytest.raises(UserError, match="cannot listen at localhost"):
            serve(folder, ServerOptions(port=taken.getsockname()[1]), print)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mode": "stage", "stage": 9}, "stage 9 does not exist"),
        ({"mode": "prefix", "stages": 9}, "stages 9 does not exist"),
        ({"mode": "exit", "layer": 1}, "no exit stands there"),
        ({"mode": "speculative", "stage": 9}, "stage 9 does not exist"),
        ({"mode": "speculative", "layer": 9}, "no exit stands there"),
    ],
)
def test_what_the_release_does_not_have_is_said_before_it_listens(folder, options, sentence):
    with pytest.raises(UserError, match=sentence):
        load_answering(folder, ServerOptions(**options))


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
