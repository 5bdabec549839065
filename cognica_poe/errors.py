"""Exceptions that the command line turns into one line and an exit code."""

import signal


class UserError(Exception):
    """Bad input from outside: a missing file, a wrong recipe, no space.

    The message is one line that says what is wrong, where, and what to do. The command line prints it and exits
    with code 2; library callers can catch it.
    """


class TrainingStopped(Exception):
    """A signal arrived, or the file ``stop`` came up; the run was saved at ``step``."""

    def __init__(self, step: int, number: int = signal.SIGTERM):
        super().__init__(f"stopped at step {step}; resume with --resume")
        self.step = step
        self.number = number
        """The signal that stopped it; SIGTERM for the file."""
