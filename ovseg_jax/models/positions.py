"""Positions of patches: embeddings learned on one grid and used on any other, and rotary ones.

The scale of a resized grid is the ratio of the two grids, as in transformers. The first releases of
DINO and DINOv2 added 0.1 to the target before they took the ratio, which moves every sample by a
little.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

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
    rows = jnp.einsum("th,hwd->twd", down, grid)
    both = jnp.einsum("sw,twd->tsd", across, rows)
    return both.reshape(target[0] * target[1], -1)


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al., 2021) in the form of DINOv3 (Simeoni et al., 2025).

    They have no parameters: queries and keys are turned by angles that depend on where their patch
    lies relative to the sides of the image, so that any grid will do. Tokens that are no patches
    are not turned.

    Attributes:
      rows, columns: of the patch grid; its patches come last in the sequence, row-major.
      prefix: tokens before the patches (class token, registers).
      theta: bounds the wavelengths: from 1 (half a side of the image) to nearly theta.
    """

    rows: int
    columns: int
    prefix: int
    theta: float

    def angles(self, width: int) -> Float[np.ndarray, "T half"]:
        """Angles of every token, radians, for heads of `width` channels; 0 for the prefix.

        Patch centers run from -1 to 1 along each side. The first quarter of the channels goes by
        the row, the second by the column, each with wavelengths growing
        geometrically.
        """
        wave = self.theta ** (np.arange(width // 4) * 4 / width)
        sides = [(np.arange(n) + 0.5) / n * 2 - 1 for n in (self.rows, self.columns)]
        places = np.stack(np.meshgrid(*sides, indexing="ij"), axis=-1).reshape(-1, 2)
        turned = (2 * np.pi * places[..., None] / wave).reshape(len(places), -1)
        still = np.zeros((self.prefix, turned.shape[1]))
        return np.concatenate([still, turned])

    def __call__(self, x: Float[Array, "B N T d"]) -> Float[Array, "B N T d"]:
        """Turns channel pairs (i, i + d/2) of queries or keys; d must be a multiple of 4."""
        angles = self.angles(x.shape[-1])
        cosine, sine = (jnp.asarray(f(angles), jnp.float32)[None, None] for f in (np.cos, np.sin))
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        turned = [first * cosine - second * sine, second * cosine + first * sine]
        return jnp.concatenate(turned, axis=-1).astype(x.dtype)
