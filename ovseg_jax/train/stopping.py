"""Asked to stop: Ctrl-C, and the SIGTERM that machines send before they are taken away."""

import os
import signal
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from ovseg_jax import processes
from ovseg_jax.errors import RESTART


class Interrupted(processes.OrderlyEnd):
    """The run was asked to stop; its state is on disk.

    Attributes:
      exit_code: 130 after Ctrl-C, `errors.RESTART` after SIGTERM.
    """

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


class StopSignal:
    """Turns SIGINT and SIGTERM into a question asked between steps, so that no step is cut in half.

    A second Ctrl-C is immediate. In a job of several processes the notice reaches one of them
    first, and all must save the same step: there JAX's preemption service listens for SIGTERM and
    makes the processes agree, and Ctrl-C is handed on to it.
    """

    def __init__(self) -> None:
        self._alone = jax.process_count() == 1
        self._number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        wanted = (signal.SIGINT, signal.SIGTERM) if self._alone else (signal.SIGINT,)
        try:
            self._before = {number: signal.signal(number, self._handle) for number in wanted}
        except ValueError:
            self._before = {}  # not the main thread: signals stay as they are
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
