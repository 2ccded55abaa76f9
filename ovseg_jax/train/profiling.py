"""A trace of some steps for TensorBoard's profiler or Perfetto."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def step_range(text: str) -> tuple[int, int]:
    """'100:105' -> (100, 105), the steps from the first to before the last; a flag type."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise ValueError(text)
    return int(found[1]), int(found[2])


class Profiler:
    """Traces the steps of a range on the first process.

    Args:
      steps: (first, end), or None for none. directory: where the trace goes.
      say: is told where it is.
    """

    def __init__(self, steps: tuple[int, int] | None, directory: Path, say: Callable[[str], None]):
        self._steps = steps if jax.process_index() == 0 else None
        self._directory, self._say = directory, say
        self._running = False

    def before(self, step: int) -> None:
        """Called with the number of steps taken, before the next one."""
        if self._steps and self._steps[0] <= step < self._steps[1] and not self._running:
            jax.profiler.start_trace(str(self._directory))
            self._running = True

    def after(self, step: int, results: Any) -> None:
        """Called with the number of steps taken and what the last one computes."""
        if self._running and step >= self._steps[1]:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self._running:
            jax.profiler.stop_trace()
            self._running, self._steps = False, None
            self._say(f"trace: {self._directory} (tensorboard --logdir, or ui.perfetto.dev)")
