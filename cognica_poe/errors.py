"""The one exception that stands for a user's mistake."""


class UserError(Exception):
    """Bad input from outside: a missing file, a wrong recipe, no space.

    The message is one line that says what is wrong, where, and what to do. The command line prints it and exits
    with code 2; library callers can catch it.
    """
