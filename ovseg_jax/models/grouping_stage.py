"""A further grouping stage of GroupViT: segments are grouped again (Xu et al., 2022, Sec. 3.1)."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from ovseg_jax.models.binding import Binding
from ovseg_jax.models.grouping_block import GroupingBlock, TokenMixing
from ovseg_jax.models.layers import layer_norm, logical
from ovseg_jax.models.stack import PreNormStack
from ovseg_jax.shapes import Array, Float


class GroupingStage(nn.Module):
    """Layers over the segments of the stage before and new group tokens, then a grouping block.

    The new tokens start from what the earlier stage's tokens became: their own learned part (zero
    at first) plus a token mixing of those.

    Attributes:
      tokens: number of new group tokens. num_groups: of segments that come out.
      layers: the stage's Transformer layers.
      block: its grouping block.
    """

    tokens: int
    layers: PreNormStack
    block: GroupingBlock
    eps: float
    dtype: Any
    matmul_dtype: Any

    @nn.compact
    def __call__(
        self,
        segments: Float[Array, "B segments D"],
        earlier: Float[Array, "B earlier D"],
        train: bool,
    ) -> tuple[Binding, Float[Array, "B tokens D"]]:
        """Args:
          segments: groups that the stage before gave.
          earlier: that stage's group tokens after its layers, before its grouping block.
          train: stochastic depth and Gumbel noise on.

        Returns:
          The binding of segments to groups, and this stage's tokens before it.
        """
        count, width = segments.shape[1:]
        learned = self.param(
            "group_token",
            logical(nn.initializers.zeros, None, "embed"),
            (self.tokens, width),
            jnp.float32,
        )
        options = {"dtype": self.dtype, "matmul_dtype": self.matmul_dtype}
        normed = layer_norm("projector_norm", self.eps, self.dtype)(earlier)
        carried = TokenMixing(self.tokens, width // 2, name="projector", **options)(normed)
        tokens = learned[None].astype(self.dtype) + carried
        x = self.layers(jnp.concatenate([segments, tokens], axis=1), train)
        tokens = x[:, count:]
        return self.block(tokens, x[:, :count], train), tokens
