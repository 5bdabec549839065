"""A command of the project as a process whose time and memory are told."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from cognica_poe.files import sha256_file


@dataclass(frozen=True)
class Cost:
    """What a command took."""

    seconds: float
    processor_seconds: float
    """Of all its processes."""
    peak_mb: float
    """Resident memory of the largest of its processes."""

    def as_dict(self) -> dict[str, float]:
        """The figures, rounded."""
        return {name: round(value, 2) for name, value in asdict(self).items()}


_MEASURE = """
import json, resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss / 1e3]), file=open(sys.argv[1], "w"))
sys.exit(code)
"""


def run(words: list[object], work: Path, limit: Callable[[], None] | None = None) -> Cost:
    """Run ``cognica-poe WORDS``; ``limit`` is called in the process before. Raises CalledProcessError."""
    work.mkdir(parents=True, exist_ok=True)
    report = work / "cost.json"
    began = time.perf_counter()
    line = [sys.executable, "-m", "cognica_poe.cli", *map(str, words)]
    subprocess.run([sys.executable, "-c", _MEASURE, str(report), *line], check=True, preexec_fn=limit)
    import json

    processor, peak = json.loads(report.read_text())
    return Cost(time.perf_counter() - began, processor, peak)


def at_most_files(count: int) -> Callable[[], None]:
    """A limit of open files, for ``run``."""
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))


def start(words: list[object]) -> subprocess.Popen[bytes]:
    """``cognica-poe WORDS`` at the head of a group of processes, so that all of it can be killed."""
    line = [sys.executable, "-m", "cognica_poe.cli", *map(str, words)]
    return subprocess.Popen(line, start_new_session=True, stderr=subprocess.DEVNULL, env=dict(os.environ))


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file of a folder."""
    return {path.name: sha256_file(path) for path in sorted(folder.iterdir()) if path.is_file()}
