"""Random erasing (Zhong et al., 2020): a rectangle of noise in some images, on the device.

The noise replaces normalized pixels, so that it has mean 0 and deviation 1 in each channel. That is
why it is not in the transform that data workers apply.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ovseg_jax.models.vit import normalize_image
from ovseg_jax.shapes import Array, Bool, Float, UInt8
from ovseg_jax.train.apply import Batch

# Rectangles are drawn at most this often; an image in which none fits stays whole.
_TRIES = 10
IMAGES = ("image", "image2")


def erased_batch(batch: Batch, spec: Mapping[str, Any], key: Array) -> Batch:
    """The batch with its images normalized, float32, and some of them partly erased.

    The images of a pair are erased independently. The model and its teacher see the same images.

    Args:
      spec: `probability` of an image being erased; `area` (least, greatest) of the rectangle as a
        share of the image, uniform; `aspect` (least, greatest) of its height / width, uniform in
        its logarithm.
      key: random key of the step.
    """
    erased = {}
    for index, name in enumerate(IMAGES):
        if name in batch:
            erased[name] = random_erasing(
                batch[name], batch["weight"], spec, jax.random.fold_in(key, index)
            )
    return {**batch, **erased}


def random_erasing(
    image: UInt8[Array, "B H W 3"],
    weight: Float[Array, "B"],
    spec: Mapping[str, Any],
    key: Array,
) -> Float[Array, "B H W 3"]:
    """Normalized images, some with one rectangle of normal noise, drawn for each pixel and channel.

    Args:
      weight: images of weight 0 stay whole, as zeros did.
      spec, key: see `erased_batch`.
    """
    where_key, noise_key = jax.random.split(key)
    inside = erased_pixels(where_key, image.shape[:3], spec) & (weight > 0)[:, None, None]
    noise = jax.random.normal(noise_key, image.shape, jnp.float32)
    return jnp.where(inside[..., None], noise, normalize_image(image))


def erased_pixels(
    key: Array, shape: tuple[int, ...], spec: Mapping[str, Any]
) -> Bool[Array, "B H W"]:
    """Which pixels are erased.

    Args:
      shape: (B, H, W).
    """
    count, height, width = shape
    keys = jax.random.split(key, 4)
    tries = (count, _TRIES)
    low, high = spec["area"]
    area = height * width * jax.random.uniform(keys[0], tries, jnp.float32, low, high)
    bounds = jnp.log(jnp.asarray(spec["aspect"], jnp.float32))
    aspect = jnp.exp(jax.random.uniform(keys[1], tries, jnp.float32, bounds[0], bounds[1]))
    rows = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    columns = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (rows < height) & (columns < width)
    first = jnp.argmax(fits, axis=1)[:, None]
    rows = jnp.take_along_axis(rows, first, axis=1)
    columns = jnp.take_along_axis(columns, first, axis=1)
    place = jax.random.uniform(keys[2], (2, count, 1), jnp.float32)
    top = jnp.floor(place[0] * (height - rows + 1).astype(jnp.float32)).astype(jnp.int32)
    left = jnp.floor(place[1] * (width - columns + 1).astype(jnp.float32)).astype(jnp.int32)
    chosen = jax.random.uniform(keys[3], (count,), jnp.float32) < spec["probability"]
    chosen = chosen & jnp.any(fits, axis=1)
    row, column = jnp.arange(height)[None], jnp.arange(width)[None]
    down = (row >= top) & (row < top + rows)
    across = (column >= left) & (column < left + columns)
    return chosen[:, None, None] & down[:, :, None] & across[:, None, :]
