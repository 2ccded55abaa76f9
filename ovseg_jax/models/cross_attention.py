"""Cross-attention followed by a feed-forward and a closing LayerNorm."""

from typing import Any

from flax import linen as nn

from ovseg_jax.models.layers import FeedForward, MultiHeadAttention, layer_norm
from ovseg_jax.shapes import Array, Float


class CrossAttentionBlock(nn.Module):
    """`q += MHA(q, x); q += FFN(LN(q)); q = LN(q)`, as in GroupViT (Xu et al., 2022).

    Queries and context come in normalized: the block has no LayerNorm in front of its attention.

    Attributes:
      heads: must divide the width of the queries.
      mlp_ratio: width of the feed-forward over that of the queries.
    """

    heads: int
    mlp_ratio: float
    eps: float
    dtype: Any
    matmul_dtype: Any

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "B Q D"],
        context: Float[Array, "B T Dc"],
    ) -> Float[Array, "B Q D"]:
        options = {"dtype": self.dtype, "matmul_dtype": self.matmul_dtype}
        attention = MultiHeadAttention(self.heads, name="attention", **options)
        x = queries + attention(queries, context)
        hidden = round(queries.shape[-1] * self.mlp_ratio)
        normed = layer_norm("mlp_norm", self.eps, self.dtype)(x)
        x = x + FeedForward(hidden, name="mlp", **options)(normed)
        return layer_norm("norm", self.eps, self.dtype)(x)
