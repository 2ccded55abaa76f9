"""The largest batch that fits, by doubling and halving."""

from collections.abc import Callable


def largest(fits: Callable[[int], bool], start: int, step: int) -> int | None:
    """The largest batch size, of `start` times powers of two, that fits.

    Args:
      fits: asked once for each size tried.
      start: tried first; a size twice as large follows while sizes fit, else one half as large.
      step: sizes are multiples of it; `start` is rounded up to one.

    Returns:
      None where not even a batch of less than two steps fits.
    """
    size = -(-start // step) * step
    if fits(size):
        while fits(2 * size):
            size *= 2
        return size
    while size // 2 >= step:
        size = size // 2 // step * step
        if fits(size):
            return size
    return None
