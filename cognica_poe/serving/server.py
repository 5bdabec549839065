"""An OpenAI-compatible server over one release, decoded by the modes of this package."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cognica_poe.errors import UserError
from cognica_poe.recipe.rules import require_ranges
from cognica_poe.serving.options import ServerOptions

NEEDED = {"fastapi": "fastapi", "uvicorn": "uvicorn", "openai": "openai", "prometheus_client": "prometheus-client"}


def serve(checkpoint: Path, options: ServerOptions, log: Callable[[str], None]) -> None:
    """Serve a release folder over HTTP until interrupted: /v1/completions, /v1/chat/completions, /v1/models, /health,
    /metrics. Requests under way are finished before it ends.

    Raises UserError for what is no release folder or a damaged one, for missing packages of the extra ``serve``, a
    wrong option, and an address that is taken.
    """
    from cognica_poe.release.export import check_release

    check_release(checkpoint, to_load=True)
    if missing := [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]:
        raise UserError(f"serve needs {', '.join(missing)}: pip install 'cognica-poe[serve]'")
    require_ranges(options, "serve: --")
    _require_device(options.device)
    import uvicorn

    from cognica_poe.serving.app import make_app

    answering, name = load_answering(checkpoint, options), Path(checkpoint).resolve().name
    app = make_app(answering, name, options)
    listening = _listen(options)
    log(f"serving {name}, mode {answering.mode}, at http://{options.host}:{options.port}/v1 (Ctrl-C ends)")
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=30)
    uvicorn.Server(config).run(sockets=[listening])


def load_answering(checkpoint: Path, options: ServerOptions) -> Any:
    """A release in memory, ready to answer. Raises UserError for a mode that it does not have."""
    import torch

    from cognica_poe.release.loading import load
    from cognica_poe.serving.engine import Answering

    model, tokenizer = load(checkpoint, None, None)
    if options.dtype != "auto":
        model.to(getattr(torch, options.dtype))  # type: ignore[arg-type]  # transformers hides its arguments
    found = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(found if options.device == "auto" else options.device)  # type: ignore[arg-type]  # as above
    model.eval()
    if options.mode not in ("wand", "speculative"):
        model.prepare_decoding(width=1)  # rows of others fill a product, not lanes of one's own
    return Answering(model, tokenizer, options)


def _listen(options: ServerOptions) -> Any:
    """A socket that listens. Raises UserError for an address that is taken or that this machine does not have."""
    import socket

    try:
        family = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((options.host, options.port), family=family, backlog=2048)
    except OSError as error:
        raise UserError(
            f"serve: cannot listen at {options.host}:{options.port}: {error.strerror or error}; choose another --port "
            "or --host"
        ) from error


def _require_device(name: str) -> None:
    """Raise UserError for a device that is none, or that this machine does not have."""
    import torch

    try:
        kind = "cpu" if name == "auto" else torch.device(name).type
    except RuntimeError as error:
        raise UserError(f"serve: --device {name!r} names no device; use auto, cpu or cuda:0") from error
    if kind != "cpu" and not (kind in ("cuda", "mps", "xpu") and getattr(torch, kind).is_available()):
        raise UserError(f"serve: --device {name!r} is not there on this machine; use auto or cpu")
