"""What the sizes of a checkpoint's tensors say about its model."""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ovseg_jax.errors import UserError


class Sizes:
    """Shapes of a checkpoint's tensors, asked for by name.

    Args:
      tensors: by name; anything with a shape.
      kind: what the checkpoint should be, for messages ("released checkpoint").
    """

    def __init__(self, tensors: Mapping[str, Any], kind: str):
        self._tensors, self._kind = tensors, kind

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        """The shape of a tensor.

        Raises:
          UserError: there is no such tensor, or it has another number of axes.
        """
        if name not in self._tensors:
            raise UserError(
                f"no {self._kind}: it has no tensor {name}. Its first tensors are "
                f"{', '.join(list(self._tensors)[:3])}"
            )
        found = tuple(np.shape(self._tensors[name]))
        if len(found) != axes:
            raise UserError(f"{name} has shape {found}, but needs {axes} axes")
        return found

    def depth(self, prefix: str) -> int:
        """How many numbered layers, "PREFIX.0." and on, there are."""
        pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
        found = {int(match[1]) for match in map(pattern.match, self._tensors) if match}
        return max(found) + 1 if found else 0


def grid_of(positions: int, told: tuple[int, int] | None, name: str) -> tuple[int, int]:
    """Rows and columns of a table of position embeddings.

    Args:
      positions: entries of the table. told: rows and columns; None for a square.
      name: of the tensor, for the message.

    Raises:
      UserError: the grid does not have that many positions.
    """
    side = math.isqrt(positions)
    rows, columns = told or (side, side)
    if rows * columns != positions or not positions:
        raise UserError(
            f"{name} has {positions} positions, which is no grid of {rows} x {columns}; tell the "
            "grid's rows and columns"
        )
    return rows, columns


def complete_told(told: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What was told, over the defaults.

    Raises:
      UserError: something was told that has no default.
    """
    unknown = sorted(set(told) - set(defaults))
    if unknown:
        raise UserError(f"{', '.join(unknown)}: not among what can be told: {', '.join(defaults)}")
    return {**defaults, **told}
