"""BERT encoder (Devlin et al., 2019) and the sentence vector taken from it."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ovseg_jax.models.layers import TRUNCATED_NORMAL, layer_norm, logical
from ovseg_jax.models.transformer import PostNormLayer, scanned
from ovseg_jax.shapes import Array, Bool, Float, Int


def pool_tokens(
    tokens: Float[Array, "B M D"], mask: Bool[Array, "B M"], pool: str
) -> Float[Array, "B D"]:
    """The sentence vector of a token sequence.

    Args:
      tokens: token features.
      mask: True at real tokens. A row with no real token gives its first feature, or 0 for "mean".
      pool: "eot" (the last real token; the paper's), "cls" (the first) or "mean" (of the real
        tokens; what sentence-transformers models are trained with).
    """
    if pool == "cls":
        return tokens[:, 0]
    if pool == "eot":
        last = jnp.maximum(jnp.sum(mask.astype(jnp.int32), axis=1) - 1, 0)
        return jnp.take_along_axis(tokens, last[:, None, None], axis=1)[:, 0]
    weights = mask.astype(tokens.dtype)[..., None]
    return jnp.sum(tokens * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1)


class BertEncoder(nn.Module):
    """Token, position and type embeddings followed by post-norm layers.

    Attributes:
      vocab_size, width, depth, heads, mlp_width: of the encoder.
      max_positions: rows of the position table.
      dropout: rate after the embeddings and on both residual branches, in training.
      eps: of every LayerNorm.
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
    dtype: Any = jnp.float32
    matmul_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, ids: Int[Array, "B M"], mask: Bool[Array, "B M"], train: bool = False
    ) -> Float[Array, "B M D"]:
        """Last hidden state; padding (mask False) is never attended to."""

        def table(name: str, rows: int, axis: str | None) -> Array:
            return self.param(
                name, logical(TRUNCATED_NORMAL, axis, "embed"), (rows, self.width), jnp.float32
            )

        length = ids.shape[1]
        x = jnp.take(table("word", self.vocab_size, "vocab"), ids, axis=0)
        positions = table("position", self.max_positions, None)
        # Padding's own embeddings never train. (They could only where padded positions are read.)
        x = jnp.where(mask[..., None], x, jax.lax.stop_gradient(x))
        x = x + positions[:length][None]
        # Captions are single sentences: every token has type 0 of the two.
        x = x + table("token_type", 2, None)[:1][None]
        x = layer_norm("embed_norm", self.eps, self.dtype)(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        stack = scanned(PostNormLayer, self.depth, in_axes=nn.broadcast, remat=self.remat)
        layers = stack(
            self.heads,
            self.mlp_width,
            self.eps,
            self.dropout,
            train,
            self.dtype,
            self.matmul_dtype,
            name="layers",
        )
        return layers(x, mask)[0]
