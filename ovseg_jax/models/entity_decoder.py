"""Masked entity completion's decoder: the masked caption looks at the groups (Eq. 8)."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from ovseg_jax.models.layers import Dense, FeedForward, MultiHeadAttention, layer_norm
from ovseg_jax.models.transformer import CrossAttentionBlock, PreNormLayer
from ovseg_jax.shapes import Array, Bool, Float


class SelfFirstLayer(nn.Module):
    """Pre-norm Transformer decoder layer: self-attention, cross-attention, feed-forward."""

    heads: int
    mlp_ratio: float
    eps: float
    dtype: Any
    matmul_dtype: Any

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B M Dd"],
        mask: Bool[Array, "B M"] | None,
        groups: Float[Array, "B K D"],
    ) -> Float[Array, "B M Dd"]:
        options = {"dtype": self.dtype, "matmul_dtype": self.matmul_dtype}
        normed = layer_norm("self_norm", self.eps, self.dtype)(x)
        x = x + MultiHeadAttention(self.heads, name="self_attention", **options)(
            normed, normed, mask
        )
        normed = layer_norm("cross_norm", self.eps, self.dtype)(x)
        x = x + MultiHeadAttention(self.heads, name="cross_attention", **options)(normed, groups)
        normed = layer_norm("mlp_norm", self.eps, self.dtype)(x)
        hidden = round(x.shape[-1] * self.mlp_ratio)
        return x + FeedForward(hidden, name="mlp", **options)(normed)


class CrossFirstLayer(nn.Module):
    """Cross-attention to the groups first, then a self-attention layer, then one more residual.

    Every layer looks up from the caption's own tokens again; what the layer before gave is added
    to what was found.
    """

    heads: int
    mlp_ratio: float
    eps: float
    dtype: Any
    matmul_dtype: Any

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "B M Dd"],
        before: Float[Array, "B M Dd"] | None,
        mask: Bool[Array, "B M"] | None,
        groups: Float[Array, "B K Dd"],
    ) -> Float[Array, "B M Dd"]:
        """`before` is the layer before's output, None in the first."""
        options = {"dtype": self.dtype, "matmul_dtype": self.matmul_dtype}
        query = layer_norm("token_norm", self.eps, self.dtype)(tokens)
        context = layer_norm("group_norm", self.eps, self.dtype)(groups)
        found = CrossAttentionBlock(self.heads, self.mlp_ratio, self.eps, name="cross", **options)(
            query, context
        )
        x = found if before is None else before + found
        layer = PreNormLayer(
            self.heads, self.mlp_ratio, self.eps, None, False, False, name="self", **options
        )
        x, _ = layer(x, jnp.zeros((), jnp.float32), mask)
        return layer_norm("norm", self.eps, self.dtype)(x + found)


class EntityDecoder(nn.Module):
    """Completes a masked caption by looking at the groups.

    Attributes:
      width: of the decoder.
      depth: number of layers.
      order: "self_first" (a Transformer decoder layer as Eq. 8 names it: the caption's tokens are
        projected to `width`, a LayerNorm closes the chain) or "cross_first" (the released model's
        order; tokens and groups are projected only where their width is not `width`).
      mask_padding: padding takes no part in the self-attention.
    """

    width: int
    heads: int
    mlp_ratio: float = 4.0
    eps: float = 1e-6
    order: str = "self_first"
    depth: int = 1
    mask_padding: bool = True
    dtype: Any = jnp.float32
    matmul_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "B M Dt"],
        mask: Bool[Array, "B M"],
        groups: Float[Array, "B K D"],
    ) -> Float[Array, "B M Dd"]:
        options = {"dtype": self.dtype, "matmul_dtype": self.matmul_dtype}
        sizes = (self.heads, self.mlp_ratio, self.eps)
        keep = mask if self.mask_padding else None

        def project(name: str, x: Array) -> Array:
            return Dense(self.width, (None, "embed"), name=name, **options)(x)

        if self.order == "self_first":
            x = project("project", tokens)
            for index in range(self.depth):
                x = SelfFirstLayer(*sizes, name=f"layer_{index}", **options)(x, keep, groups)
            return layer_norm("norm", self.eps, self.dtype)(x)
        if tokens.shape[-1] != self.width:
            tokens = project("align_text", tokens)
        if groups.shape[-1] != self.width:
            groups = project("align_image", groups)
        x = None
        for index in range(self.depth):
            layer = CrossFirstLayer(*sizes, name=f"layer_{index}", **options)
            x = layer(tokens, x, keep, groups)
        return x
