"""Position embeddings learned on one patch grid, used on any other."""

import jax.numpy as jnp
import numpy as np

from ovseg_jax.models.layers import contract
from ovseg_jax.shapes import Array, Float

# Keys' cubic kernel with the constant that DINO, DINOv2 and the ViT family were resized with.
CUBIC_A = -0.75


def cubic_weights(source: int, target: int) -> Float[np.ndarray, "target source"]:
    """Matrix of one-dimensional bicubic interpolation.

    Half-pixel centers, no antialiasing, border values repeated; each row sums to one. With
    ``source == target`` it is the identity.

    Args:
      source, target: number of samples along the axis before and after.
    """
    center = (np.arange(target) + 0.5) * source / target - 0.5
    first = np.floor(center).astype(int)
    weights = np.zeros((target, source))
    for offset in range(-1, 3):
        x = np.abs(center - (first + offset))
        near = ((CUBIC_A + 2) * x - (CUBIC_A + 3)) * x * x + 1
        far = CUBIC_A * (((x - 5) * x + 8) * x - 4)
        value = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
        np.add.at(weights, (np.arange(target), np.clip(first + offset, 0, source - 1)), value)
    return weights.astype(np.float32)


def resize_grid(
    table: Float[Array, "L D"], source: tuple[int, int], target: tuple[int, int]
) -> Float[Array, "L2 D"]:
    """Resizes a row-major table of position embeddings from one grid to another.

    Args:
      table: embeddings of a `source` grid, row-major.
      source, target: (rows, columns). Nothing is computed where they agree.
    """
    if source == target:
        return table
    grid = table.reshape(*source, -1)
    down, across = (jnp.asarray(cubic_weights(*pair)) for pair in zip(source, target, strict=True))
    rows = contract("th,hwd->twd", down, grid, jnp.float32)
    both = contract("sw,twd->tsd", across, rows, jnp.float32)
    return both.reshape(target[0] * target[1], -1)
