"""A process that packs the shards which a training run will need next, while the run trains on the ones before.

It is told what to pack over a pipe and ends with it, so that a run that is killed leaves nobody behind. What it packs
is what the run would pack itself: where it is late, or gone, the run does that, and nothing but time is lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from cognica_poe.data.rows.sequence import RowSettings, pack_shard
from cognica_poe.data.rows.store import are_complete, load_facts
from cognica_poe.data.tokenizer import load_tokenizer
from cognica_poe.errors import UserError

_NICENESS = 10
_PACKAGE = Path(__file__).parents[3]


class Packer:
    """The process, started when it is first needed. A context manager: leaving it ends the process."""

    def __init__(
        self, data_dir: Path, tokenizer: Path, rows_dir: Path, settings: RowSettings, log: Callable[[str], None]
    ) -> None:
        """What rows are packed from, and where to; ``log`` is told of a process that died."""
        self._words = [os.path.abspath(path) for path in (data_dir, tokenizer, rows_dir)]
        self.rows_dir, self.settings, self.log = Path(rows_dir), settings, log
        self._process: subprocess.Popen[bytes] | None = None
        self._wanted: set[tuple[int, int]] = set()
        self._done: set[tuple[int, int]] = set()
        self._failed = False

    def want(self, epoch: int, shard: int, fingerprint: str) -> bool:
        """Whether the rows of a shard are there; if not, they are to be packed."""
        if (epoch, shard) in self._done:
            return True
        facts = load_facts(self.rows_dir, self.settings.split, epoch, shard, fingerprint)
        if facts is not None and are_complete(self.rows_dir, facts):
            self._done.add((epoch, shard))
            return True
        if (epoch, shard) not in self._wanted and not self._failed:
            self._wanted.add((epoch, shard))
            self._tell([epoch, shard])
        return False

    def forget(self, epoch: int, shard: int) -> None:
        """The rows of a shard were deleted."""
        self._done.discard((epoch, shard))
        self._wanted.discard((epoch, shard))

    def _tell(self, what: list[int]) -> None:
        if self._process is None:
            self._process = self._start()
        pipe = self._process.stdin
        assert pipe is not None
        try:
            pipe.write(f"{json.dumps(what)}\n".encode())
            pipe.flush()
        except OSError:
            self._failed = True
            self.log("rows: the process that packs ahead has ended; shards are packed when they are needed")

    def _start(self) -> subprocess.Popen[bytes]:
        paths = [str(_PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-m", __name__, *self._words, json.dumps(asdict(self.settings))]
        return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment)

    def __enter__(self) -> Packer:
        return self

    def __exit__(self, *about: object) -> None:
        if self._process is not None:
            self._process.terminate()
            if self._process.stdin is not None:
                with contextlib.suppress(OSError):  # it was dead before
                    self._process.stdin.close()
            self._process.wait()


def main(words: list[str]) -> int:
    """Pack what the lines of stdin name, ``[epoch, shard]`` each, until it is closed; 2 after a user's mistake."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run that started this process decides
    os.nice(_NICENESS)
    data_dir, tokenizer, rows_dir = map(Path, words[:3])
    settings = RowSettings(**json.loads(words[3]))
    try:
        loaded = load_tokenizer(tokenizer)
        for line in sys.stdin:
            pack_shard(data_dir, loaded, rows_dir, settings, *json.loads(line))
    except UserError as error:
        print(f"cognica-poe: packing ahead: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
