"""A release, and servers over it in a thread of this process."""

import contextlib
import threading
import time

import pytest
import torch

from cognica_poe.data.tokenizer import train_tokenizer
from cognica_poe.release.export import export_release
from cognica_poe.serving.options import ServerOptions
from cognica_poe.serving.server import load_answering
from tests.conftest import make_model
from tests.release.conftest import BOUNDS, record_of

TEXT = "the cat sat on the mat and the dog sat on the log; "


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A release."""
    place = tmp_path_factory.mktemp("served")
    tokenizer = train_tokenizer([TEXT * 20], 275, place / "tokenizer")
    model = make_model(dtype=torch.float32, vocab_size=tokenizer.vocab_size)
    settings = {"record": record_of(model, 300), "wand_bounds": BOUNDS, "name": "tiny", "step": 300}
    return export_release(model, tokenizer.folder, place / "release", **settings)


@contextlib.contextmanager
def running(folder, **options):
    """Port and innards of a server over a release."""
    uvicorn = pytest.importorskip("uvicorn")
    from cognica_poe.serving.app import make_app

    settings = ServerOptions(**options)
    answering = load_answering(folder, settings)
    server = uvicorn.Server(uvicorn.Config(make_app(answering, "tiny", settings), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    for _ in range(600):
        if server.started:
            break
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield port, answering
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def served(folder):
    """A server of mode full."""
    with running(folder) as found:
        yield found


@pytest.fixture
def client(served):
    """The openai package's own client of it."""
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"http://127.0.0.1:{served[0]}/v1", api_key="none", max_retries=0)
