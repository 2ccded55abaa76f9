"""The model as a step runs it: running statistics go in and come out, texts share one pass."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from ml_collections import ConfigDict

from ovseg_jax import sharding
from ovseg_jax.errors import UserError
from ovseg_jax.models.ovsegmentor import STATISTICS, OVSegmentor
from ovseg_jax.shapes import Array, Bool, Float, Int
from ovseg_jax.sharding import AnyMesh

Batch = Mapping[str, Array]
Params = Mapping[str, Any]


def apply(
    model: OVSegmentor,
    params: Params,
    statistics: Params,
    method: str,
    *args: Any,
    rngs: Mapping[str, jax.Array] | None = None,
) -> tuple[Any, Params]:
    """`model.method(*args)`, and the running statistics after it.

    Args:
      statistics: running statistics of the model's batch norms, which a call in training moves;
        {} where the model has none. No gradient flows into them.
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
    leaves, structure = jax.tree.flatten(x)
    apart = [leaf.reshape(-1, count, *leaf.shape[1:]) for leaf in leaves]
    return [structure.unflatten([leaf[:, i] for leaf in apart]) for i in range(count)]


# ---- images


def images_of(batch: Batch, second: bool) -> tuple[Array, ...]:
    """The batch's images, or cached features in their place: one, or both of a pair."""
    stem = "image_features" if "image_features" in batch else "image"
    names = (stem, stem.replace("image", "image2")) if second else (stem,)
    return tuple(batch[name] for name in names)


def grid_of(model: OVSegmentor, image: Array, patches: int) -> tuple[int, int]:
    """(rows, columns) of an image's patches.

    Args:
      image: of the batch, or cached features, whose grid is a square.

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


# ---- texts


@struct.dataclass
class Sentences:
    """One text for each example. What a cache does not hold is None.

    Attributes:
      pooled: sentence vectors, [B, Dt].
      tokens: token features, [B, M, Dt], padding included.
      mask: True at real tokens, [B, M].
    """

    pooled: Float[Array, "B Dt"] | None
    tokens: Float[Array, "B M Dt"] | None
    mask: Bool[Array, "B M"] | None


def encode_texts(
    model: OVSegmentor,
    params: Params,
    batch: Batch,
    kinds: tuple[str, ...],
    train: bool,
    rngs: Mapping[str, jax.Array],
    mesh: AnyMesh | None,
) -> dict[str, Sentences]:
    """The texts that a step needs, encoded in one pass or read from the batch.

    Args:
      kinds: which of "caption", "masked", "prompt" and "shared".
      train: dropout on.
    """
    if "caption_pooled" in batch:
        return {kind: sharding.keep_split(_cached(batch, kind), mesh) for kind in kinds}
    ids = merge(*(batch[f"{kind}_ids"] for kind in kinds))
    text = model.apply({"params": params}, ids, train, method="text_tokens", rngs=rngs)
    parts = sharding.keep_split(unmerge(text, len(kinds)), mesh)
    return {
        kind: Sentences(part.pooled, part.tokens, part.mask)
        for kind, part in zip(kinds, parts, strict=True)
    }


def _cached(batch: Batch, kind: str) -> Sentences:
    if kind == "masked":
        return Sentences(None, batch["masked_tokens"].astype(jnp.float32), batch["masked_mask"])
    return Sentences(batch[f"{kind}_pooled"].astype(jnp.float32), None, None)


def embed_sentences(
    model: OVSegmentor, params: Params, statistics: Params, text: Sentences
) -> tuple[Float[Array, "B E"], Params]:
    """Sentence vectors in the joint space, not normalized, and the statistics after them."""
    embedded, statistics = apply(model, params, statistics, "embed_text", text.pooled, True)
    if statistics:
        # The released model's statistics are a mixture of sentence vectors and of all tokens,
        # padding included.
        _, statistics = apply(model, params, statistics, "embed_text", text.tokens, True)
    return embedded, statistics


def see_sentences(
    model: OVSegmentor, params: Params, statistics: Params, text: Sentences
) -> Params:
    """The statistics after sentences that no term of the loss reads in the joint space."""
    return embed_sentences(model, params, statistics, text)[1] if statistics else statistics


def within_set(batch: Batch, config: ConfigDict) -> Int[Array, "B"] | None:
    """The data set of each example, where its negatives come from that set alone."""
    return batch["data_set"] if config.negatives_within_set else None
