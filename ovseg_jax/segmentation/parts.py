"""An evaluation shared between processes: which images are whose, and their counts put together."""

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Int64

# Counts of one process -> counts of all, one row each.
Gather = Callable[[Int64[np.ndarray, " counts"]], Int64[np.ndarray, "processes counts"]]


def this_part() -> tuple[int, int]:
    """(number of this process, number of processes); a process takes every images-th image."""
    return jax.process_index(), jax.process_count()


def gather_counts(counts: Int64[np.ndarray, " counts"]) -> Int64[np.ndarray, "processes counts"]:
    """The counts of every process, on every process.

    Pixels of a whole data set need 64 bits, which JAX arrays do not have by default, so their bytes
    travel.
    """
    if jax.process_count() == 1:
        return counts[None]
    from jax.experimental import multihost_utils

    rows = multihost_utils.process_allgather(counts.view(np.uint8))
    return np.ascontiguousarray(rows).view(np.int64)
