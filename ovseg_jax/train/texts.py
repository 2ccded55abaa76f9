"""The texts of a batch: encoded in one pass, or read from the batch where they are cached."""

from typing import Any

import jax.numpy as jnp
from flax import struct

from ovseg_jax import sharding
from ovseg_jax.shapes import Array, Bool, Float
from ovseg_jax.sharding import AnyMesh
from ovseg_jax.train.batches import Batch, merge, unmerge
from ovseg_jax.train.calls import Calls


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
    call: Calls, batch: Batch, kinds: tuple[str, ...], train: bool, rngs: Any, mesh: AnyMesh | None
) -> dict[str, Sentences]:
    """The texts that a step needs.

    Args:
      kinds: which of "caption", "masked", "prompt" and "shared".
      train: dropout on.
    """
    if "caption_pooled" in batch:
        return {kind: sharding.keep_split(_cached(batch, kind), mesh) for kind in kinds}
    ids = merge(*(batch[f"{kind}_ids"] for kind in kinds))
    text = call("text_tokens", ids, train, rngs=rngs)
    parts = sharding.keep_split(unmerge(text, len(kinds)), mesh)
    return {
        kind: Sentences(part.pooled, part.tokens, part.mask)
        for kind, part in zip(kinds, parts, strict=True)
    }


def _cached(batch: Batch, kind: str) -> Sentences:
    if kind == "masked":
        return Sentences(None, batch["masked_tokens"].astype(jnp.float32), batch["masked_mask"])
    return Sentences(batch[f"{kind}_pooled"].astype(jnp.float32), None, None)


def embed_sentences(call: Calls, text: Sentences) -> Float[Array, "B E"]:
    """Sentence vectors in the joint space, as they come.

    Where the projector has a batch norm, all the tokens (padding too) pass it as well, for their
    part in the running statistics: the released model's are a mixture of both.
    """
    embedded = call("embed_text", text.pooled, True)
    if call.statistics:
        call("embed_text", text.tokens, True)
    return embedded
