"""Batches on the device: their type, and several inputs of an example in one pass."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ovseg_jax.shapes import Array

Batch = Mapping[str, Array]
# What the examples of a batch contribute to the losses: floats, one row an example.
Rows = dict[str, Array]


def merge(*parts: Array) -> Array:
    """n arrays [B, ...] as one [n B, ...] whose rows of one example stay neighbors.

    Concatenating would move every row to another device when the batch is split.
    """
    return jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])


def unmerge(x: Any, count: int) -> list[Any]:
    """Inverse of `merge`, over the leaves of a tree."""
    leaves, structure = jax.tree.flatten(x)
    apart = [leaf.reshape(-1, count, *leaf.shape[1:]) for leaf in leaves]
    return [structure.unflatten([leaf[:, i] for leaf in apart]) for i in range(count)]
