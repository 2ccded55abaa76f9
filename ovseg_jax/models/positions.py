"""Position embeddings learned on one patch grid, used on any other.

The scale is the ratio of the two grids, as in transformers. The first releases of DINO and DINOv2
added 0.1 to the target before they took the ratio, which moves every sample by a little.
"""

import jax.numpy as jnp
import numpy as np

from ovseg_jax.models.layers import contract
from ovseg_jax.shapes import Array, Float

# Keys' cubic kernel with the constant that DINO, DINOv2 and the ViT family were resized with, and
# the constant that goes with antialiasing (Pillow's, and of DINOv2 with registers).
CUBIC_A = -0.75
ANTIALIAS_A = -0.5

RESIZING = {"bicubic": False, "bicubic_antialias": True}


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    x = np.abs(distance)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def cubic_weights(
    source: int, target: int, antialias: bool = False
) -> Float[np.ndarray, "target source"]:
    """Matrix of one-dimensional bicubic interpolation.

    Half-pixel centers; each row sums to one. With ``source == target`` it is the identity.

    Args:
      source, target: number of samples along the axis before and after.
      antialias: widen the kernel where the axis shrinks. Then what lies beyond the border is left
        out and the rest of the row rescaled; otherwise border values are repeated.
    """
    if antialias:
        stretch = max(source / target, 1.0)
        center = (np.arange(target) + 0.5) * source / target
        distance = np.arange(source)[None] + 0.5 - center[:, None]
        weights = _cubic(distance / stretch, ANTIALIAS_A)
        return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    center = (np.arange(target) + 0.5) * source / target - 0.5
    first = np.floor(center).astype(int)
    weights = np.zeros((target, source))
    for offset in range(-1, 3):
        value = _cubic(center - (first + offset), CUBIC_A)
        np.add.at(weights, (np.arange(target), np.clip(first + offset, 0, source - 1)), value)
    return weights.astype(np.float32)


def resize_grid(
    table: Float[Array, "L D"],
    source: tuple[int, int],
    target: tuple[int, int],
    antialias: bool = False,
) -> Float[Array, "L2 D"]:
    """Resizes a row-major table of position embeddings from one grid to another.

    Args:
      table: embeddings of a `source` grid, row-major.
      source, target: (rows, columns). Nothing is computed where they agree.
      antialias: see `cubic_weights`.
    """
    if source == target:
        return table
    grid = table.reshape(*source, -1)
    down, across = (
        jnp.asarray(cubic_weights(*pair, antialias)) for pair in zip(source, target, strict=True)
    )
    rows = contract("th,hwd->twd", down, grid, jnp.float32)
    both = contract("sw,twd->tsd", across, rows, jnp.float32)
    return both.reshape(target[0] * target[1], -1)
