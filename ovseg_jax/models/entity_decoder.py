"""Masked entity completion's decoder: one pre-norm Transformer decoder layer (Eq. 8)."""

from typing import Any

from flax import linen as nn

from ovseg_jax.models.layers import Dense, FeedForward, MultiHeadAttention, layer_norm
from ovseg_jax.shapes import Array, Bool, Float


class EntityDecoder(nn.Module):
    """Completes a masked caption by looking at the groups.

    Self-attention among the caption's tokens (both directions, padding masked), cross-attention to
    the groups, feed-forward; each on a normalized input with a residual. A final LayerNorm closes
    the pre-norm chain.

    Attributes:
      width: of the decoder; the caption's tokens are projected to it first.
    """

    width: int
    heads: int
    mlp_ratio: float
    eps: float
    dtype: Any
    matmul_dtype: Any

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "B M Dt"],
        mask: Bool[Array, "B M"],
        groups: Float[Array, "B K D"],
    ) -> Float[Array, "B M Dd"]:
        options = {"dtype": self.dtype, "matmul_dtype": self.matmul_dtype}
        x = Dense(self.width, (None, "embed"), name="project", **options)(tokens)
        normed = layer_norm("self_norm", self.eps, self.dtype)(x)
        x = x + MultiHeadAttention(self.heads, name="self_attention", **options)(
            normed, normed, mask
        )
        normed = layer_norm("cross_norm", self.eps, self.dtype)(x)
        x = x + MultiHeadAttention(self.heads, name="cross_attention", **options)(normed, groups)
        normed = layer_norm("mlp_norm", self.eps, self.dtype)(x)
        x = x + FeedForward(int(self.width * self.mlp_ratio), name="mlp", **options)(normed)
        return layer_norm("norm", self.eps, self.dtype)(x)
