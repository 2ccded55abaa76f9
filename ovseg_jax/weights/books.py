"""The closing of a conversion: every source tensor used once or named, every target filled."""

from collections import Counter
from collections.abc import Iterable, Sequence

from ovseg_jax.errors import UserError


def close_books(
    faults: Sequence[str],
    *,
    tensors: Iterable[str],
    used: Iterable[str],
    left_out: Iterable[str],
    wanted: Iterable[str],
    reached: Iterable[str],
    origin: str,
) -> None:
    """Refuses a conversion that is not total.

    Args:
      faults: what else was found wrong.
      tensors: names of the source tensors. used: those that were used, as often as they were.
      left_out: those that are left out on purpose.
      wanted: paths that must be filled. reached: those that something fills.
      origin: where the tensors come from, for the message.

    Raises:
      UserError: one message that lists every fault, tensor used twice or without a place, and path
        that nothing fills.
    """
    times = Counter(used)
    faults = list(faults)
    faults += [f"{name} is used twice" for name in sorted(n for n in times if times[n] > 1)]
    homeless = set(tensors) - set(times) - set(left_out)
    faults += [f"{name} has no place in this model" for name in sorted(homeless)]
    faults += [f"{path} is not filled" for path in sorted(set(wanted) - set(reached))]
    if faults:
        raise UserError(f"{origin} does not fit the model:\n  " + "\n  ".join(faults))
