"""Runs that hang: who stands where, and an end to it."""

import faulthandler
import multiprocessing
import os
import sys
import threading
import time
from typing import Any

import jax

from ovseg_jax.errors import RESTART

# Seconds that a process of several stays after it has printed its stacks. All began to wait within
# a step of one another; when the first one leaves, the runtime ends the others at once. Process 0
# holds them together, and is the last.
FOR_THE_OTHERS, LAST = 10.0, 3.0


class Watchdog:
    """Ends a process in which nothing happens any more.

    It says what was waited for, prints the stack of every thread and exits with `errors.RESTART`.
    There is no other way out: a thread that waits for a lost file system or for a lost process
    cannot be interrupted, and Python would wait for it at exit. In a job of several processes one
    that hangs holds up all the others, whose own watchdogs print their stacks too before any of
    them leaves; what comes in that time after all is taken.

    Args:
      seconds: to wait for any one thing; 0 waits for ever.
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
            if expected is not None and time.monotonic() - expected[1] > self._seconds:
                _tell_stacks(expected[0], self._seconds)
                if self._came_while_the_others_told_theirs(expected):
                    print(f"{expected[0]} came after all: going on", file=sys.stderr, flush=True)
                else:
                    _leave()

    def _came_while_the_others_told_theirs(self, expected: tuple[str, float]) -> bool:
        if jax.process_count() > 1:
            time.sleep(FOR_THE_OTHERS + (LAST if jax.process_index() == 0 else 0.0))
        return self._expected is not expected


def _tell_stacks(what: str, seconds: float) -> None:
    print(
        f"error: process {jax.process_index()} of {jax.process_count()} has waited more than "
        f"{seconds:g} s for {what} (config.hang_seconds). Its stacks follow. The same "
        "command goes on from the last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
    sys.stderr.flush()


def _leave() -> None:
    for worker in multiprocessing.active_children():
        worker.kill()  # they would outlive a process that leaves like this
    os._exit(RESTART)
