"""The text side: BERT, CLIP's causal encoder, and the decoder that completes a masked caption."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ovseg_jax.models.layers import (
    Dense,
    FeedForward,
    Floats,
    LayerNorm,
    MultiHeadAttention,
    embeddings,
    quick_gelu,
)
from ovseg_jax.models.transformer import (
    CrossAttentionBlock,
    PostNormLayer,
    PreNormLayer,
    PreNormStack,
    scanned,
)
from ovseg_jax.shapes import Array, Bool, Float, Int


def pool_tokens(
    tokens: Float[Array, "B M D"], mask: Bool[Array, "B M"], pool: str
) -> Float[Array, "B D"]:
    """The sentence vector of the tokens where `mask` is True.

    `pool` is "eot" (the last one; the paper's), "cls" (the first) or "mean" (as
    sentence-transformers train). Without a real token it is the first feature, or 0 for "mean".
    """
    if pool == "cls":
        return tokens[:, 0]
    if pool == "eot":
        last = jnp.maximum(jnp.sum(mask.astype(jnp.int32), axis=1) - 1, 0)
        return jnp.take_along_axis(tokens, last[:, None, None], axis=1)[:, 0]
    weights = mask.astype(tokens.dtype)[..., None]
    return jnp.sum(tokens * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1)


def up_to_end(ids: Int[Array, "B M"], end_id: int) -> Bool[Array, "B M"]:
    """True up to and with the first end token; everywhere where there is none.

    Byte-pair vocabularies pad with the end token again, or with a token that is also a word.
    """
    ends = (ids == end_id).astype(jnp.int32)
    return jnp.cumsum(ends, axis=1) - ends == 0


class BertEncoder(Floats):
    """BERT (Devlin et al., 2019): token, position and type embeddings, then post-norm layers.

    `dropout` acts after the embeddings and on both residual branches. `remat`: see `scanned`.
    """

    vocab_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    max_positions: int = 512
    dropout: float = 0.1
    eps: float = 1e-12
    remat: str = "none"

    @nn.compact
    def __call__(
        self, ids: Int[Array, "B M"], mask: Bool[Array, "B M"], train: bool = False
    ) -> Float[Array, "B M D"]:
        """Last hidden state; padding (mask False) is never attended to."""
        x = jnp.take(embeddings(self, "word", self.vocab_size, self.width, "vocab"), ids, axis=0)
        positions = embeddings(self, "position", self.max_positions, self.width)
        # Padding's own embeddings never train. (They could only where padded positions are read.)
        x = jnp.where(mask[..., None], x, jax.lax.stop_gradient(x))
        x = x + positions[: ids.shape[1]][None]
        # Captions are single sentences: every token has type 0 of the two.
        x = x + embeddings(self, "token_type", 2, self.width)[:1][None]
        x = LayerNorm(self.eps, self.dtype, name="embed_norm")(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        stack = scanned(PostNormLayer, self.depth, in_axes=nn.broadcast, remat=self.remat)
        sizes = (self.heads, self.mlp_width, self.eps, self.dropout, train)
        return stack(*sizes, name="layers", **self.floats)(x, mask)[0]


class CausalTextEncoder(Floats):
    """The text encoder of CLIP and GroupViT (Radford et al., 2021; Xu et al., 2022).

    The feature of the end token is the sentence's (pooling "eot").
    """

    vocab_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    max_positions: int = 77
    end_id: int = 49407
    eps: float = 1e-5
    remat: str = "none"

    @nn.compact
    def __call__(
        self, ids: Int[Array, "B M"], mask: Bool[Array, "B M"], train: bool = False
    ) -> Float[Array, "B M D"]:
        """Final features."""
        del mask  # padding comes last, where no real token sees it
        word = jnp.take(embeddings(self, "word", self.vocab_size, self.width, "vocab"), ids, axis=0)
        position = embeddings(self, "position", self.max_positions, self.width)[: ids.shape[1]]
        options = {"remat": self.remat, "activation": quick_gelu, **self.floats}
        sizes = (self.depth, self.heads, self.mlp_width / self.width, self.eps)
        stack = PreNormStack(*sizes, causal=True, name="stack", **options)
        x = stack((word + position[None]).astype(self.dtype), train)
        return LayerNorm(self.eps, self.dtype, name="norm")(x)


class SelfFirstLayer(Floats):
    """Pre-norm Transformer decoder layer: self-attention, cross-attention, feed-forward."""

    heads: int
    mlp_ratio: float
    eps: float

    @nn.compact
    def __call__(self, x: Array, mask: Array | None, groups: Array) -> Float[Array, "B M Dd"]:
        """The caption's tokens [B, M, Dd], their mask [B, M], and the groups [B, K, D]."""
        normed = LayerNorm(self.eps, self.dtype, name="self_norm")(x)
        attend = MultiHeadAttention(self.heads, name="self_attention", **self.floats)
        x = x + attend(normed, normed, mask)
        normed = LayerNorm(self.eps, self.dtype, name="cross_norm")(x)
        attend = MultiHeadAttention(self.heads, name="cross_attention", **self.floats)
        x = x + attend(normed, groups)
        normed = LayerNorm(self.eps, self.dtype, name="mlp_norm")(x)
        hidden = round(x.shape[-1] * self.mlp_ratio)
        return x + FeedForward(hidden, name="mlp", **self.floats)(normed)


class CrossFirstLayer(Floats):
    """Cross-attention to the groups first, then a self-attention layer, then one more residual.

    Every layer starts from the caption's own tokens; the output of the layer before is added.
    """

    heads: int
    mlp_ratio: float
    eps: float

    @nn.compact
    def __call__(
        self, tokens: Array, before: Array | None, mask: Array | None, groups: Array
    ) -> Float[Array, "B M Dd"]:
        sizes = (self.heads, self.mlp_ratio, self.eps)
        query = LayerNorm(self.eps, self.dtype, name="token_norm")(tokens)
        context = LayerNorm(self.eps, self.dtype, name="group_norm")(groups)
        found = CrossAttentionBlock(*sizes, name="cross", **self.floats)(query, context)
        x = found if before is None else before + found
        layer = PreNormLayer(*sizes, name="self", **self.floats)
        x, _ = layer(x, jnp.zeros((), jnp.float32), mask)
        return LayerNorm(self.eps, self.dtype, name="norm")(x + found)


class EntityDecoder(Floats):
    """Completes a masked caption by looking at the groups (Eq. 8).

    Attributes:
      order: "self_first" (Eq. 8's Transformer decoder layer: tokens are projected to `width`, a
        LayerNorm ends it) or "cross_first" (the released model's: tokens and groups are projected
        only where their width is not `width`).
      depth: number of layers.
      mask_padding: padding takes no part in the self-attention.
    """

    width: int
    heads: int
    mlp_ratio: float = 4.0
    eps: float = 1e-6
    order: str = "self_first"
    depth: int = 1
    mask_padding: bool = True

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "B M Dt"], mask: Array, groups: Float[Array, "B K D"]
    ) -> Float[Array, "B M Dd"]:
        sizes = (self.heads, self.mlp_ratio, self.eps)
        keep = mask if self.mask_padding else None

        def project(name: str, x: Array) -> Any:
            return Dense(self.width, (None, "embed"), name=name, **self.floats)(x)

        if self.order == "self_first":
            x = project("project", tokens)
            for index in range(self.depth):
                layer = SelfFirstLayer(*sizes, name=f"layer_{index}", **self.floats)
                x = layer(x, keep, groups)
            return LayerNorm(self.eps, self.dtype, name="norm")(x)
        if tokens.shape[-1] != self.width:
            tokens = project("align_text", tokens)
        if groups.shape[-1] != self.width:
            groups = project("align_image", groups)
        x = None
        for index in range(self.depth):
            layer = CrossFirstLayer(*sizes, name=f"layer_{index}", **self.floats)
            x = layer(tokens, x, keep, groups)
        return x
