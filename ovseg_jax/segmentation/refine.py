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


@functools.partial(jax.jit, static_argnames=("steps", "dilations"))
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
    # Differences are divided by their own spread, so the range of the colors does not matter.
    colors = jnp.asarray(image).astype(jnp.float32) / 255.0
    neighbors = jnp.stack(list(_shifted(colors, dilations)))
    center = jnp.broadcast_to(colors[None], (len(dilations), *colors.shape))
    deviation = jnp.std(jnp.concatenate([neighbors, center]), axis=0, ddof=1)
    distance = jnp.abs(neighbors - colors[None]) / (0.1 * deviation + 1e-8)[None]
    weights = jax.nn.softmax(-jnp.mean(distance, axis=-1), axis=0)

    def smooth(step: Array, current: Array) -> Array:
        total = jnp.zeros_like(current)
        for number, shifted in enumerate(_shifted(current, dilations)):
            total = total + weights[number][..., None] * shifted
        return total

    return jax.lax.fori_loop(0, steps, smooth, jnp.asarray(maps))


def _shifted(x: Array, dilations: tuple[int, ...]) -> Iterator[Array]:
    """The values of each neighbor, as maps of the same size."""
    h, w = x.shape[:2]
    for far in dilations:
        padded = jnp.pad(x, ((far, far), (far, far), (0, 0)), mode="edge")
        for down, right in _AROUND:
            top, left = far * (1 + down), far * (1 + right)
            yield padded[top : top + h, left : left + w]
