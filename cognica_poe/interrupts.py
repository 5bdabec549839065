"""SIGTERM and SIGINT: every command ends in time with 143 or 130, whatever it is in the middle of.

The main thread is interrupted by an exception and cleans up as it unwinds; training notes the signal and stops where a
step may be left. Where the main thread sits in compiled code (a tokenizer in training, a compressor, a wait for other
ranks) or cannot finish in time, a thread that the kernel wakes removes what this process has half-written and ends it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from cognica_poe.leftovers import drop_owned, shield

GRACE = 5.0
"""Seconds that a command has to unwind."""
AGAIN = 2.0
"""Seconds after which another signal is a second one: launchers send the first one twice to whom they started."""
_NUMBERS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(KeyboardInterrupt):
    """A signal arrived."""

    def __init__(self, number: int):
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number


class _State:
    """What this process does about signals. One for the process, as its handlers are."""

    def __init__(self) -> None:
        self.number: int | None = None
        """The first signal."""
        self.deferred = False
        """A signal is remembered instead of raised."""
        self.grace = GRACE
        self.farewell: Callable[[], str] | None = None
        """What is said when the time is over, instead of naming the signal."""
        self.pipe: tuple[int, int] | None = None
        """Where the kernel reports signals, once ``watch`` was called."""


_state = _State()


def watch() -> None:
    """Take over both signals for the whole process. Called once, by the main thread."""
    if _state.pipe is not None:
        return
    _state.pipe = os.pipe()
    os.set_blocking(_state.pipe[1], False)
    signal.set_wakeup_fd(_state.pipe[1], warn_on_full_buffer=False)
    for number in _NUMBERS:
        signal.signal(number, _on_signal)
    threading.Thread(target=_stand_by, args=(_state.pipe[0],), name="signals", daemon=True).start()


def arrived() -> int | None:
    """The first signal that this process got, or heard of from another rank."""
    return _state.number


def hear_no_more() -> None:
    """Ignore further signals: the interpreter is about to end, and would be killed by them as it takes itself apart."""
    if _state.pipe is not None:
        for number in _NUMBERS:
            signal.signal(number, signal.SIG_IGN)


def speaks() -> bool:
    """Whether this process says how it ends: of several ranks the first one does."""
    return os.environ.get("RANK", "0") == "0"


def hear_of(number: int) -> None:
    """Another rank got a signal: this process ends as if it had got it, too."""
    if _state.number is None:
        _state.number = number
        if _state.pipe is not None:
            os.write(_state.pipe[1], bytes([number]))


@contextlib.contextmanager
def deferred(grace: float, farewell: Callable[[], str]) -> Iterator[None]:
    """Within the block a signal interrupts nothing: the block asks ``arrived``. For the main thread.

    Args:
        grace: seconds that the process then has until it is ended.
        farewell: gives the line to leave if that happens.
    """
    before = _state.deferred, _state.grace, _state.farewell
    handlers = {number: signal.signal(number, _on_signal) for number in _NUMBERS}
    _state.deferred, _state.grace, _state.farewell = True, grace, farewell
    try:
        yield
    finally:
        _state.deferred, _state.grace, _state.farewell = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if _state.pipe is None:
            _state.number = None  # nobody ends this process: what it does next starts afresh


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within ``deferred``: a block that a signal interrupts all the same, also one that came before it."""
    before, _state.deferred = _state.deferred, False
    try:
        if _state.number is not None:
            raise Interrupted(_state.number)
        yield
    finally:
        _state.deferred = before


def _on_signal(number: int, frame: FrameType | None) -> None:
    first, _state.number = _state.number is None, _state.number or number
    if first and not _state.deferred:  # a second one does not interrupt the cleaning up
        if shield.depth:
            shield.late = functools.partial(_interrupt, number)
        else:
            raise Interrupted(number)


def _interrupt(number: int) -> None:
    raise Interrupted(number)


def _stand_by(reader: int) -> None:
    """Wait for a signal, then for the process to end by itself or for the end of its time."""
    number = _next_signal(reader)
    began = time.monotonic()
    while time.monotonic() < began + _state.grace:
        ready, _, _ = select.select([reader], [], [], 0.1)
        if ready and _next_signal(reader) and time.monotonic() > began + AGAIN:
            break
    line = _state.farewell() if _state.farewell else str(Interrupted(number))
    drop_owned()
    if speaks() and select.select([], [2], [], 0)[1]:
        os.write(2, f"cognica-poe: {line}\n".encode())
    os._exit(128 + number)


def _next_signal(reader: int) -> int:
    """The number of the next of both signals."""
    while (number := os.read(reader, 1)[0]) not in _NUMBERS:
        pass
    return number
