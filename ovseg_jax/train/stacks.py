"""Where every thread of a process stands, for people who look at one that runs."""

import faulthandler
import functools
import os
import signal
import sys
import threading
from typing import Any

# Seconds within which the thread below prints, if it is told of a signal.
_SOON = 1.0


def print_stacks_on_signal() -> None:
    """From now on ``kill -USR1 PID`` prints the stack of every thread; the process goes on.

    Signals that end it print them too: SIGABRT by the runtime, when another process is lost, and
    crashes. To be called by the main thread.
    """
    # The process's own stderr: what may stand in its place is no file that a signal can write to.
    faulthandler.enable(file=sys.__stderr__, all_threads=True)
    _listen()


@functools.cache
def _listen() -> None:
    """Not `faulthandler.register`: it looks at the other threads' frames while these run on, and
    now and then the process crashes in it. With Python's lock, which a thread that calls
    `dump_traceback` holds, they stand still.

    A handler in Python runs in the main thread alone, and not while that waits for something
    outside of Python. So a thread waits for the byte that the interpreter writes for each signal
    as it comes. (An event loop may take that byte for itself; then the handler prints.)
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    shown = threading.Event()

    def show() -> None:
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)

    def wait() -> None:
        while True:
            if signal.SIGUSR1 in os.read(reading, 64):
                show()
                shown.set()

    def handle(*_: Any) -> None:
        if not shown.wait(_SOON):
            show()
        shown.clear()

    threading.Thread(target=wait, name="stacks", daemon=True).start()
    signal.signal(signal.SIGUSR1, handle)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
