"""The one exception that is meant for a person rather than for a debugger."""


class UserError(Exception):
    """Bad input. The message says what is wrong, where, and what to do.

    Entry points print it as one line and exit with code 2 (`flags.run`); nothing below them
    catches it.
    """
