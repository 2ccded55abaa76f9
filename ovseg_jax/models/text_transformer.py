"""The causal text encoder of CLIP and GroupViT (Radford et al., 2021; Xu et al., 2022)."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from ovseg_jax.models.layers import TRUNCATED_NORMAL, layer_norm, logical
from ovseg_jax.models.transformer import PreNormStack
from ovseg_jax.shapes import Array, Bool, Float, Int


def up_to_end(ids: Int[Array, "B M"], end_id: int) -> Bool[Array, "B M"]:
    """True up to the first end token, that one included; everywhere where there is none.

    Byte-pair vocabularies have no padding of their own: texts are padded with the end token again,
    or with a token that is also a word.
    """
    ends = (ids == end_id).astype(jnp.int32)
    return jnp.cumsum(ends, axis=1) - ends == 0


class CausalTextEncoder(nn.Module):
    """Token and position embeddings, pre-norm layers in which no token looks ahead, a LayerNorm.

    Attributes:
      vocab_size, width, depth, heads, mlp_width, max_positions: of the encoder.
      end_id: the end token, whose feature is the sentence's (pooling "eot").
      activation: see `FeedForward`.
      eps: of every LayerNorm.
    """

    vocab_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    max_positions: int = 77
    end_id: int = 49407
    activation: str = "quick_gelu"
    eps: float = 1e-5
    remat: str = "none"
    dtype: Any = jnp.float32
    matmul_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, ids: Int[Array, "B M"], mask: Bool[Array, "B M"], train: bool = False
    ) -> Float[Array, "B M D"]:
        """Final features. Padding comes last, where no real token sees it: `mask` is not needed."""
        del mask

        def table(name: str, rows: int, axis: str | None) -> Array:
            return self.param(
                name, logical(TRUNCATED_NORMAL, axis, "embed"), (rows, self.width), jnp.float32
            )

        word = jnp.take(table("word", self.vocab_size, "vocab"), ids, axis=0)
        position = table("position", self.max_positions, None)[: ids.shape[1]]
        stack = PreNormStack(
            self.depth,
            self.heads,
            self.mlp_width / self.width,
            self.eps,
            None,
            (0.0,) * self.depth,
            self.remat,
            self.dtype,
            self.matmul_dtype,
            causal=True,
            activation=self.activation,
            name="stack",
        )
        x = stack((word + position[None]).astype(self.dtype), train)
        return layer_norm("norm", self.eps, self.dtype)(x)
