"""Total conversion: every source tensor used once or dropped by name, every target filled once."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ovseg_jax.weights.books import close_books
from ovseg_jax.weights.tensors import Tensors


def transpose(weight: np.ndarray) -> np.ndarray:
    """A linear weight from [out, in] to [in, out]."""
    return weight.T


def same(value: np.ndarray) -> np.ndarray:
    """The tensor as it is."""
    return value


@dataclass(frozen=True)
class Rule:
    """How one of our parameters is made.

    Attributes:
      target: path of the parameter, "a/b/c".
      sources: names of the source tensors. With more than one the results are stacked on a new
        leading axis (one per layer of a scanned stack).
      transform: applied to each source.
    """

    target: str
    sources: tuple[str, ...]
    transform: Callable[[np.ndarray], np.ndarray] = same
    stack: bool = False


def convert(
    tensors: Tensors,
    rules: Iterable[Rule],
    shapes: Mapping[str, tuple[int, ...]],
    dropped: Iterable[str],
    origin: str,
) -> dict[str, np.ndarray]:
    """Applies the rules and checks that nothing is left over on either side.

    Args:
      shapes: path and shape of every parameter that must be filled.
      dropped: patterns (`re.fullmatch`) of source tensors that are left out on purpose.
      origin: where the tensors come from, for messages.

    Returns:
      path to float32 array.

    Raises:
      UserError: lists every missing, unused, unfilled and misshapen tensor.
    """
    result: dict[str, np.ndarray] = {}
    used: list[str] = []
    faults: list[str] = []
    for rule in rules:
        missing = [name for name in rule.sources if name not in tensors]
        if missing:
            faults += [f"{name} is missing (for {rule.target})" for name in missing]
            continue
        used += rule.sources
        parts = [rule.transform(np.asarray(tensors[name], np.float32)) for name in rule.sources]
        if len({part.shape for part in parts}) > 1:
            listed = ", ".join(
                f"{name} {part.shape}" for name, part in zip(rule.sources, parts, strict=True)
            )
            faults.append(f"{rule.target} is made of tensors of several shapes: {listed}")
            continue
        value = np.stack(parts) if rule.stack else parts[0]
        wanted = shapes.get(rule.target)
        if wanted is None:
            faults.append(f"{rule.target} is not a parameter of this model")
        elif tuple(wanted) != value.shape:
            faults.append(
                f"{rule.target} has shape {tuple(wanted)}, {rule.sources[0]} gives {value.shape}"
            )
        if rule.target in result:
            faults.append(f"{rule.target} is filled twice")
        result[rule.target] = value
    patterns = [re.compile(pattern) for pattern in dropped]
    close_books(
        faults,
        tensors=tensors,
        used=used,
        left_out=[name for name in tensors if any(p.fullmatch(name) for p in patterns)],
        wanted=shapes,
        reached=[rule.target for rule in rules],
        origin=origin,
    )
    return result
