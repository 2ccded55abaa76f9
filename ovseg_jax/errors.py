"""Errors meant for a person, not for a debugger."""

# 128 + SIGTERM, as a shell reports a process that was asked to end. Of the codes from 128 to 255
# launchers take that a restart may help (xpk restarts on them by default, Kubeflow's ExitCode
# policy calls them retryable); of small ones, such as the 2 of bad input, that it does not.
RESTART = 143


class UserError(Exception):
    """Bad input. The message says what is wrong, where, and what to do.

    Entry points print it as one line and exit with `exit_code` (`flags.run`); nothing below them
    catches it.
    """

    exit_code = 2


class RestartError(UserError):
    """Something went wrong that the same command, given again, may well get past."""

    exit_code = RESTART
