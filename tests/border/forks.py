"""Many command lines, each in a process of its own, forked from one that has imported everything.

``python -m tests.border.forks`` reads one JSON object a line on stdin: ``words``, ``env`` (None removes a variable),
``cwd``, ``seconds``, ``nobody`` (give up root's right to read everything). It answers each with a line: ``code``
(negative: the signal that ended it), ``out`` and ``err`` (as text, undecodable bytes escaped).
"""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

IMPORTS = (
    "cognica_poe.cli.main",
    "cognica_poe.pipeline",
    "cognica_poe.bench.decoding",
    "cognica_poe.bench.memory",
    "cognica_poe.bench.prompts",
    "cognica_poe.bench.training",
    "cognica_poe.planning.plan",
    "cognica_poe.release.export",
    "cognica_poe.release.loading",
    "cognica_poe.release.publish.revisions",
    "cognica_poe.release.report.html",
    "cognica_poe.serving.generation",
    "cognica_poe.serving.server",
    "cognica_poe.training.trainer",
    "pyarrow.parquet",
    "transformers.models.auto.tokenization_auto",
    "matplotlib.figure",
    "encodings.cp437",  # of zip files; nobody may be unable to read Python's own files
)


@dataclass
class Line:
    """A command line with what is around it."""

    words: list[str]
    cwd: str
    env: dict[str, str | None] = field(default_factory=dict)
    seconds: int = 60
    nobody: bool = False


@dataclass
class Done:
    """What came of a command line."""

    code: int
    out: str
    err: str


class Forks:
    """Runs command lines one after another. Use as a context manager."""

    def __enter__(self) -> "Forks":
        command = [sys.executable, "-m", "tests.border.forks"]
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        env = {**os.environ, **quiet, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
        root = Path(__file__).parents[2]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, cwd=root, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait(30)

    def run(self, line: Line) -> Done:
        """Run it to its end, or kill it after ``line.seconds``."""
        self.process.stdin.write(json.dumps(line.__dict__) + "\n")
        self.process.stdin.flush()
        return Done(**json.loads(self.process.stdout.readline()))


def _child(line: Line, out: int, err: int) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.chdir(line.cwd)
    for name, value in line.env.items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    tempfile.tempdir = None
    if line.nobody and os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    signal.alarm(line.seconds)
    from cognica_poe.cli.main import main

    sys.argv = ["cognica-poe", *line.words]
    main()


def _run(line: Line) -> Done:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _child(line, out.fileno(), err.fileno())
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1 if end.code else 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "backslashreplace"))
        return Done(code, *texts)


def _lines() -> Iterator[Line]:
    for text in sys.stdin:
        yield Line(**json.loads(text))


if __name__ == "__main__":
    import importlib

    import torch

    torch.set_num_threads(1)
    for name in IMPORTS:
        importlib.import_module(name)
    gc.freeze()  # what is forked stays shared
    answers = os.fdopen(os.dup(1), "w")
    for asked in _lines():
        print(json.dumps(_run(asked).__dict__), file=answers, flush=True)
