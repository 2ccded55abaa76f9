"""One job at a time in a work directory."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from ovseg_jax import processes
from ovseg_jax.errors import RestartError, UserError

FILE = ".in_use"


@contextlib.contextmanager
def claimed(workdir: Path) -> Iterator[None]:
    """Inside, no other job trains in the work directory: two would mix their steps and checkpoints.

    The first process holds a lock on ``WORKDIR/.in_use``, which the system takes back however the
    process ends. On file systems without locks nothing is held, and nothing noticed.

    Raises:
      UserError: the directory cannot be written.
      RestartError: another job holds it.
    """
    if not processes.is_first():
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / FILE).open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error}") from None
    with file:
        _lock(file.fileno(), workdir)
        with contextlib.suppress(OSError):  # a full disk is told where something is lost by it
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield


def _lock(number: int, workdir: Path) -> None:
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = (workdir / FILE).read_text(encoding="utf-8", errors="replace") or "another process"
        raise RestartError(
            f"another job trains in --workdir={workdir} ({who}): wait for its end, or give another "
            "--workdir. Of a machine that is gone a network file system lets go after a minute or "
            "two"
        ) from None
    except OSError:
        return  # no locks here
