"""How a run is asked to stop, by a signal or by a file, and how its ranks agree on where."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

from cognica_poe.interrupts import arrived, deferred, hear_of
from cognica_poe.training.parallel.ranks import Ranks

STOP_FILE = "stop"
"""``touch RUN/stop`` stops a run that then takes all the time it needs to save."""
SAVE_SECONDS = 15.0
"""From a signal until the process is ended, saved or not: launchers kill what takes longer."""


class StopRequests:
    """What asks a run to stop. A signal to one rank stops all of them.

    Args:
        run: run folder, where the first rank looks for the file ``stop``.
        ranks: this process among the others.
    """

    def __init__(self, run: Path, ranks: Ranks):
        self.file, self.ranks = Path(run) / STOP_FILE, ranks
        self.number: int | None = None
        """The signal that the run stops for, once that is agreed; SIGTERM for the file."""

    def asked(self) -> bool:
        """Whether any rank was. Collective; the answer stays yes."""
        number = arrived()
        flags = [number == signal.SIGINT, number is not None, self.ranks.is_first and self.file.exists()]
        interrupted, signalled, filed = self.ranks.any(flags)
        if signalled or filed:
            self.number = int(signal.SIGINT if interrupted else signal.SIGTERM)
        if signalled:
            hear_of(self.number or signal.SIGTERM)
        return self.number is not None

    def obeyed(self) -> None:
        """The run was saved and ends: the file is removed, and torchrun told not to start the ranks again."""
        if self.ranks.is_first:
            self.file.unlink(missing_ok=True)
        if "TORCHELASTIC_RUN_ID" in os.environ and arrived() is None:
            hear_of(signal.SIGTERM)  # which torchrun will send
            if os.environ.get("LOCAL_RANK") == "0":  # an exit code of a rank is a fault to it, its own signal is not
                os.kill(os.getppid(), signal.SIGTERM)

    def heed(self, steps: Callable[[], list[int]]) -> contextlib.AbstractContextManager[None]:
        """Within this signals interrupt nothing and are told by ``asked``. ``steps`` gives those that were saved."""

        def farewell() -> str:
            saved = steps()
            way = f"the last checkpoint is of step {saved[-1]}; go on with --resume" if saved else "nothing was saved"
            return f"ended {SAVE_SECONDS:g} seconds after the signal, before the step was saved: {way}"

        return deferred(SAVE_SECONDS, farewell)
