"""Commands as processes of their own, forked from a server that has imported everything: they start at once."""

import multiprocessing
import os
import sys
import time
from pathlib import Path

_PRELOADED = (
    "cognica_poe.cli.main",
    "cognica_poe.pipeline",
    "cognica_poe.analysis.analyzer",
    "cognica_poe.release.export",
    "cognica_poe.release.report.html",
    "cognica_poe.serving.generation",
    "cognica_poe.training.trainer",
    "tiktoken",
    "tokenizers",
)
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.conftest", *_PRELOADED])


class Command:
    """``cognica-poe WORDS`` under way.

    Args:
        words: of the command line.
        folder: for its temporary files (``tmp``) and what it says (``said``).
        environment: further variables.
    """

    def __init__(self, words, folder, environment=None):
        self.said = Path(folder) / "said"
        (Path(folder) / "tmp").mkdir(parents=True, exist_ok=True)
        environment = {"TMPDIR": str(Path(folder) / "tmp"), **(environment or {})}
        self.process = _CONTEXT.Process(
            target=_enter, args=([str(word) for word in words], str(self.said), environment)
        )
        self.began = time.monotonic()
        self.process.start()

    def signal(self, number):
        """Send a signal, if the process is still there; returns whether it was."""
        alive = self.process.exitcode is None
        if alive:
            os.kill(self.process.pid, number)
        return alive

    def wait(self, timeout=120.0):
        """Exit code; negative for the signal that killed it. Fails when it does not end in time."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, "the command hangs"
        return self.process.exitcode

    @property
    def lines(self):
        """What it said on stderr."""
        return self.said.read_text().splitlines() if self.said.is_file() else []


def _enter(words, said, environment):
    import tempfile

    import torch

    from cognica_poe.cli.main import main

    os.environ.update(environment)
    tempfile.tempdir = None
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    sys.argv = ["cognica-poe", *words]
    main()
