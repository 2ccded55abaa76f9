"""Refinement of score maps by the image's own colors: pixel-adaptive mask refinement (PAMR).

Araslanov and Roth, *Single-Stage Semantic Segmentation from Image Labels*, CVPR 2020, Sec. 3.3. The
score of a pixel becomes a mean over its neighbors, most of all those of a like color, again and
again. A pixel's neighbors are the eight around it at each of the distances (dilations), the border
repeated outside; their weights are

    softmax over neighbors of  -mean over channels of |x_i - x_n| / (0.1 sigma_i + 1e-8)

where sigma_i is the (unbiased) standard deviation of each channel over the pixel and its neighbors,
the pixel once for each distance.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from ovseg_jax.shapes import Array, Float, UInt8

_AROUND = tuple((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0))


# Floats of the maps that are refined at one time: each class by itself, so that many need no more
# memory than few. A multiple of 16 classes suits vector units.
FLOATS, VECTOR = 16 << 20, 16


def pamr(
    maps: Float[Array | np.ndarray, "H W C"],
    image: UInt8[Array | np.ndarray, "H W 3"],
    *,
    steps: int,
    dilations: tuple[int, ...],
) -> Float[Array, "H W C"]:
    """The maps after `steps` rounds; see the module's docstring.

    Args:
      maps: scores of any kind. image: of the same size.
    """
    maps, weights = jnp.asarray(maps), _weights(image, dilations=dilations)
    h, w, count = maps.shape
    most = min(count, max(1, FLOATS // (h * w * VECTOR)) * VECTOR)
    parts = []
    for first in range(0, count, most):
        # The last classes once more where they don't fill it up: nothing is compiled again.
        start = min(first, count - most)
        part = _smoothed(maps[..., start : start + most], weights, steps=steps, dilations=dilations)
        parts.append(part[..., first - start :])
    return jnp.concatenate(parts, axis=-1)


@functools.partial(jax.jit, static_argnames=("dilations",))
def _weights(
    image: UInt8[Array | np.ndarray, "H W 3"], *, dilations: tuple[int, ...]
) -> Float[Array, "neighbors H W"]:
    # Differences are divided by their own spread, so the range of the colors does not matter.
    colors, many = jnp.asarray(image).astype(jnp.float32) / 255.0, len(dilations)
    mean = (sum(_shifted(colors, dilations)) + many * colors) / (9.0 * many)
    squares = sum(jnp.square(x - mean) for x in _shifted(colors, dilations))
    squares = squares + many * jnp.square(colors - mean)
    deviation = jnp.sqrt(squares / (9.0 * many - 1.0))
    unit = 0.1 * deviation + 1e-8
    near = [-jnp.mean(jnp.abs(x - colors) / unit, axis=-1) for x in _shifted(colors, dilations)]
    return jax.nn.softmax(jnp.stack(near), axis=0)


@functools.partial(jax.jit, static_argnames=("steps", "dilations"))
def _smoothed(
    maps: Float[Array, "H W C"],
    weights: Float[Array, "neighbors H W"],
    *,
    steps: int,
    dilations: tuple[int, ...],
) -> Float[Array, "H W C"]:
    def smooth(step: Array, current: Array) -> Array:
        total = jnp.zeros_like(current)
        for number, shifted in enumerate(_shifted(current, dilations)):
            total = total + weights[number][..., None] * shifted
        return total

    return jax.lax.fori_loop(0, steps, smooth, maps)


def _shifted(x: Array, dilations: tuple[int, ...]) -> Iterator[Array]:
    """The values of each neighbor, as maps of the same size."""
    h, w = x.shape[:2]
    for far in dilations:
        padded = jnp.pad(x, ((far, far), (far, far), (0, 0)), mode="edge")
        for down, right in _AROUND:
            top, left = far * (1 + down), far * (1 + right)
            yield padded[top : top + h, left : left + w]
