"""The model as a step runs it: running statistics go in and come out, texts share one pass.

And what a step does to its images before: random erasing (Zhong et al., 2020).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ovseg_jax import sharding
from ovseg_jax.errors import UserError
from ovseg_jax.models.ovsegmentor import STATISTICS, OVSegmentor, TextTokens
from ovseg_jax.models.vit import normalize_image
from ovseg_jax.shapes import Array, Bool, Float, Int, UInt8
from ovseg_jax.sharding import AnyMesh

Batch = Mapping[str, Array]
Params = Mapping[str, Any]

# Rectangles are drawn at most this often; an image in which none fits stays whole.
_TRIES = 10


def apply(
    model: OVSegmentor,
    params: Params,
    statistics: Params,
    method: str,
    *args: Any,
    rngs: Mapping[str, jax.Array] | None = None,
) -> tuple[Any, Params]:
    """`model.method(*args)`, and the running statistics after it.

    These, of batch norms, are moved by a call in training; {} where the model has none.
    """
    variables = {"params": params}
    if not statistics:
        return model.apply(variables, *args, method=method, rngs=rngs), statistics
    variables[STATISTICS] = statistics
    result, changed = model.apply(variables, *args, method=method, rngs=rngs, mutable=[STATISTICS])
    return result, changed[STATISTICS]


# ---- several inputs of an example in one pass


def merge(*parts: Array) -> Array:
    """n arrays [B, ...] as one [n B, ...] in which the rows of one example stay neighbors.

    Concatenating would move every row to another device when the batch is split.
    """
    return jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])


def unmerge(x: Any, count: int) -> list[Any]:
    """Inverse of `merge`, over the leaves of a tree."""
    return [
        jax.tree.map(lambda leaf, i=i: leaf.reshape(-1, count, *leaf.shape[1:])[:, i], x)
        for i in range(count)
    ]


# ---- images


def grid_of(model: OVSegmentor, image: Array, patches: int) -> tuple[int, int]:
    """(rows, columns) of an image's patches; cached features must be those of a square.

    Raises:
      UserError: cached features whose grid is not a square.
    """
    if image.ndim == 4:
        patch = model.image_encoder.patch
        return image.shape[1] // patch, image.shape[2] // patch
    side = round(patches**0.5)
    if side * side != patches:
        raise UserError(
            f"cached features of {patches} patches are no square image: set "
            "config.data.cache_images = False"
        )
    return side, side


def erased_batch(batch: Batch, spec: Mapping[str, Any], key: Array) -> Batch:
    """The batch with its images normalized, float32, and some of them partly erased.

    Args:
      spec: `probability` of an image being erased; `area` (least, greatest) of the rectangle as a
        share of the image, uniform; `aspect` (least, greatest) of its height / width, uniform in
        its logarithm. Each image of a pair has its own draw.
    """
    erased = {
        name: random_erasing(batch[name], batch["weight"], spec, jax.random.fold_in(key, index))
        for index, name in enumerate(("image", "image2"))
        if name in batch
    }
    return {**batch, **erased}


def random_erasing(
    image: UInt8[Array, "B H W 3"], weight: Float[Array, "B"], spec: Mapping[str, Any], key: Array
) -> Float[Array, "B H W 3"]:
    """Normalized images, some with one rectangle of normal noise, drawn for each pixel and channel.

    The noise has the mean 0 and deviation 1 of normalized pixels, which data workers do not make.
    Images of weight 0 stay whole, as zeros did.
    """
    where_key, noise_key = jax.random.split(key)
    inside = erased_pixels(where_key, image.shape[:3], spec) & (weight > 0)[:, None, None]
    noise = jax.random.normal(noise_key, image.shape, jnp.float32)
    return jnp.where(inside[..., None], noise, normalize_image(image))


def erased_pixels(
    key: Array, shape: tuple[int, ...], spec: Mapping[str, Any]
) -> Bool[Array, "B H W"]:
    """Which pixels of images of the shape (B, H, W) are erased."""
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


# ---- texts


def encode_texts(
    model: OVSegmentor,
    params: Params,
    batch: Batch,
    kinds: tuple[str, ...],
    train: bool,
    rngs: Mapping[str, jax.Array],
    mesh: AnyMesh | None,
) -> dict[str, TextTokens]:
    """The texts of these kinds ("caption", "masked", ...), encoded in one pass or cached."""
    if "caption_pooled" in batch:
        return {kind: sharding.keep_split(_cached(batch, kind), mesh) for kind in kinds}
    ids = merge(*(batch[f"{kind}_ids"] for kind in kinds))
    text = model.apply({"params": params}, ids, train, method="text_tokens", rngs=rngs)
    parts = sharding.keep_split(unmerge(text, len(kinds)), mesh)
    return dict(zip(kinds, parts, strict=True))


def _cached(batch: Batch, kind: str) -> TextTokens:
    if kind == "masked":
        return TextTokens(batch["masked_tokens"].astype(jnp.float32), batch["masked_mask"], None)
    return TextTokens(None, None, batch[f"{kind}_pooled"].astype(jnp.float32))


def embed_sentences(
    model: OVSegmentor, params: Params, statistics: Params, text: TextTokens
) -> tuple[Float[Array, "B E"], Params]:
    """Sentence vectors in the joint space, not normalized, and the statistics after them."""
    embedded, statistics = apply(model, params, statistics, "embed_text", text.pooled, True)
    if statistics:
        # The released model's statistics are a mixture of sentence vectors and of all tokens,
        # padding included.
        _, statistics = apply(model, params, statistics, "embed_text", text.tokens, True)
    return embedded, statistics


def see_sentences(
    model: OVSegmentor, params: Params, statistics: Params, text: TextTokens
) -> Params:
    """The statistics after sentences that no term of the loss reads in the joint space."""
    return embed_sentences(model, params, statistics, text)[1] if statistics else statistics


def within_set(batch: Batch, config: ConfigDict) -> Int[Array, "B"] | None:
    """The data set of each example, where its negatives come from that set alone."""
    return batch["data_set"] if config.negatives_within_set else None
