"""How fast training is, and what it spends its time and memory on."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from ovseg_jax.train.chips import peak_flops

PERCENTILES = (50, 90, 99)


def memory_in_use() -> dict[str, float]:
    """Bytes in use and at the peak so far on this process's fullest device; {} on CPUs."""
    stats = [found for device in jax.local_devices() if (found := device.memory_stats())]
    names = {"memory_bytes": "bytes_in_use", "memory_peak_bytes": "peak_bytes_in_use"}
    return {
        name: float(max(each[key] for each in stats))
        for name, key in names.items()
        if stats and all(key in each for each in stats)
    }


class Meter:
    """Rates, step times and waiting since the last lap.

    Args:
      batch_size: global.
    """

    def __init__(self, batch_size: int):
        self._batch = batch_size
        self._flops: float | None = None
        self._peak = peak_flops(jax.devices()[0].device_kind)
        self.restart()

    def count_flops(self, step_flops: float | None) -> None:
        """FLOPs of one step, for the utilization; None leaves it out."""
        self._flops = step_flops

    def restart(self) -> None:
        """Begins a lap: what was before it does not count."""
        self._start = self._last = time.monotonic()
        self._times: list[float] = []
        self._waited = 0.0

    def timed(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The loader's batches, with the waiting counted."""
        iterator, done = iter(loader), object()
        while True:
            before = time.monotonic()
            batch = next(iterator, done)
            self._waited += time.monotonic() - before
            if batch is done:
                return
            yield batch

    def stepped(self) -> None:
        """A step has ended."""
        now = time.monotonic()
        self._times.append(now - self._last)
        self._last = now

    def lap(self) -> dict[str, float]:
        """What was measured since the last lap; {} if that was no whole step.

        `images_per_second` and the same per device, `waiting_for_data` (share of the time),
        `step_seconds_p50` and other percentiles, `flops_utilization` (of the matrix products that
        the model needs, over the devices' peak), `memory_bytes` and `memory_peak_bytes`.
        """
        if not self._times:
            return {}
        spent = max(time.monotonic() - self._start, 1e-9)
        steps_per_second = len(self._times) / spent
        rate = steps_per_second * self._batch
        values = {
            "images_per_second": rate,
            "images_per_second_per_device": rate / jax.device_count(),
            "waiting_for_data": min(1.0, self._waited / spent),
        }
        times = np.percentile(self._times, PERCENTILES)
        values |= {
            f"step_seconds_p{name}": float(value)
            for name, value in zip(PERCENTILES, times, strict=True)
        }
        if self._flops is not None and self._peak is not None:
            whole = self._peak * jax.device_count()
            values["flops_utilization"] = steps_per_second * self._flops / whole
        self.restart()
        return values | memory_in_use()
