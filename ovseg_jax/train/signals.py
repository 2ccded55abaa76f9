"""A run that is asked to stop, one that hangs, and a look at one that runs."""

import faulthandler
import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from ovseg_jax import processes
from ovseg_jax.errors import RESTART

# Seconds that a process of several stays after it has printed its stacks: when one leaves, the
# runtime ends the others at once, and all shall have printed theirs. Process 0 is the last.
FOR_THE_OTHERS, LAST = 10.0, 3.0


class Interrupted(processes.OrderlyEnd):
    """The run was asked to stop, by Ctrl-C or SIGTERM as `exit_code` says; its state is on disk."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class StopSignal:
    """SIGINT and SIGTERM as a question that is asked between steps, so that no step is cut in half.

    A second Ctrl-C is immediate. The processes of a job must all save the same step: there JAX's
    preemption service listens for SIGTERM and makes them agree, and Ctrl-C is handed on to it.
    """

    def __init__(self) -> None:
        self._alone = jax.process_count() == 1
        self._number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        wanted = (signal.SIGINT, signal.SIGTERM) if self._alone else (signal.SIGINT,)
        # In another thread signals stay as they are.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in wanted}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def reached(self, step: int) -> bool:
        """Whether to save and leave after `step`. Every process asks after every step."""
        if self._alone:
            return self._number is not None
        return multihost_utils.reached_preemption_sync_point(step)

    @property
    def exit_code(self) -> int:
        """Of the process, once it stops."""
        return 128 + signal.SIGINT if self._number == signal.SIGINT else RESTART

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._number == signal.SIGINT:
                raise KeyboardInterrupt
            if not self._alone:
                os.kill(os.getpid(), signal.SIGTERM)
        self._number = number


class Watchdog:
    """Ends a process that waits longer than so many seconds (0: for ever) for any one thing.

    It says what the process waited for, prints the stack of every thread and exits with
    `errors.RESTART`, without Python's clean-up: that would wait for the thread that hangs. In a job
    all processes wait for the one that hangs, and print their stacks before any of them leaves; if
    what they waited for comes in that time, they go on.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._expected: tuple[str, float] | None = None
        self._done = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._seconds > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()

    def expect(self, what: str) -> None:
        """The time starts: `what` should happen before the next call of `expect` or `rest`."""
        self._expected = (what, time.monotonic())

    def rest(self) -> None:
        """Nothing is expected: what comes now may take as long as it likes."""
        self._expected = None

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self._seconds / 4)):
            expected = self._expected
            if expected is None or time.monotonic() - expected[1] <= self._seconds:
                continue
            print(
                f"error: process {jax.process_index()} of {jax.process_count()} has waited more "
                f"than {self._seconds:g} s for {expected[0]} (config.hang_seconds). Its stacks "
                "follow. The same command goes on from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
            _print_stacks()
            if jax.process_count() > 1:
                time.sleep(FOR_THE_OTHERS + (LAST if jax.process_index() == 0 else 0.0))
            if self._expected is not expected:
                print(f"{expected[0]} came after all: going on", file=sys.stderr, flush=True)
                continue
            for worker in multiprocessing.active_children():
                worker.kill()  # they would outlive a process that leaves like this
            os._exit(RESTART)


def _print_stacks() -> None:
    # The process's real stderr: a replacement may be no file that a signal can write to.
    faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
    sys.stderr.flush()


@functools.cache
def print_stacks_on_signal() -> None:
    """From now on ``kill -USR1 PID`` prints the stack of every thread; the process goes on.

    Signals that end it print them too: SIGABRT by the runtime, when another process is lost, and
    crashes. To be called by the main thread.
    """
    # `faulthandler.register` reads the frames of other threads while they run, and crashes now and
    # then; a thread that calls `dump_traceback` holds Python's lock. A handler in Python runs only
    # in the main thread, and not while that waits outside of Python. So a thread waits for the byte
    # that the interpreter writes for each signal. (An event loop may take it: the handler prints.)
    faulthandler.enable(file=sys.__stderr__, all_threads=True)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    shown = threading.Event()

    def wait() -> None:
        while True:
            if signal.SIGUSR1 in os.read(reading, 64):
                _print_stacks()
                shown.set()

    def handle(*_: Any) -> None:
        if not shown.wait(1.0):
            _print_stacks()
        shown.clear()

    threading.Thread(target=wait, name="stacks", daemon=True).start()
    signal.signal(signal.SIGUSR1, handle)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
