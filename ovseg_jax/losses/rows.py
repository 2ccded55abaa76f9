"""Comparing everything with everything, row by row, without the whole square on any device.

A contrastive loss over B examples has B x B logits: 4 GiB in float32 at a batch of 32 768. Here
each device makes the rows of its own examples alone, and where asked, a few of them at a time,
which are made again in the backward pass.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import PartitionSpec

from ovseg_jax.sharding import BATCH_AXES, AnyMesh


@dataclass(frozen=True)
class Split:
    """How rows are worked on.

    Attributes:
      mesh: where given, rows and columns are split over its batch axes. Then columns are gathered,
        which for a contrastive loss are the embeddings, and rows stay where they are.
      chunk: rows of a device that are worked on together; 0 for all of them.
    """

    mesh: AnyMesh | None = None
    chunk: int = 0


WHOLE = Split()


def over_rows(
    one: Callable[[Any, Any, Any], Any], rows: Any, columns: Any, split: Split, shared: Any = ()
) -> Any:
    """`one(row, columns, shared)` for every row.

    Args:
      one: maps a row (the leaves of `rows` without their first axis) and all columns to arrays.
      rows, columns: trees of arrays whose first axis is that of the examples.
      shared: a tree of arrays that every row needs whole.

    Returns:
      What `one` gives, with the rows as first axis.
    """

    def part(rows: Any, columns: Any, shared: Any) -> Any:
        def call(row: Any) -> Any:
            return one(row, columns, shared)

        if not split.chunk:
            return jax.vmap(call)(rows)
        return jax.lax.map(jax.checkpoint(call), rows, batch_size=split.chunk)

    if split.mesh is None or split.mesh.size == 1:
        return part(rows, columns, shared)

    def on_device(rows: Any, columns: Any, shared: Any) -> Any:
        whole = jax.tree.map(lambda x: jax.lax.all_gather(x, BATCH_AXES, tiled=True), columns)
        return part(rows, whole, shared)

    by_row = PartitionSpec(BATCH_AXES)
    return jax.shard_map(
        on_device, mesh=split.mesh, in_specs=(by_row, by_row, PartitionSpec()), out_specs=by_row
    )(rows, columns, shared)
