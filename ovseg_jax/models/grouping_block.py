"""GroupViT's grouping block, which the released model binds its patches with (Xu et al., 2022).

Where `ovseg_jax.models.binding.SlotBinding` reads the queries off the group tokens directly, as the
paper prints it, this block first mixes N group tokens down to K and lets them look at the patches.
"""

from typing import Any

import jax
from flax import linen as nn

from ovseg_jax.models.binding import Binding, assigned_map, weighted_mean
from ovseg_jax.models.cross_attention import CrossAttentionBlock
from ovseg_jax.models.layers import Dense, FeedForward, contract, gelu, layer_norm
from ovseg_jax.shapes import Array, Float


class TokenMixing(nn.Module):
    """A feed-forward over the token axis: N tokens in, `tokens` out, every channel alike.

    Attributes:
      tokens: number of tokens that come out.
      hidden: width between the two maps.
    """

    tokens: int
    hidden: int
    dtype: Any
    matmul_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B K D"]:
        options = {"dtype": self.dtype, "matmul_dtype": self.matmul_dtype}
        x = x.transpose(0, 2, 1)
        x = gelu(Dense(self.hidden, (None, "mlp"), name="fc1", **options)(x))
        x = Dense(self.tokens, ("mlp", None), name="fc2", **options)(x)
        return x.transpose(0, 2, 1)


class GroupingBlock(nn.Module):
    """Binds image tokens to K groups made of N learnable tokens.

    The tokens are mixed down to K, look at the image tokens in a cross-attention block, and are
    then assigned to (Eq. 3-5, with a single head); the bound groups pass a feed-forward. A stage of
    its own: widths are those of its inputs.

    Attributes:
      num_groups: K.
      heads: of the cross-attention; the assignment always has one.
      mlp_ratio: of the two feed-forwards.
      mixing_ratio: width of the token mixing over the tokens' own.
      assignment, scale, gumbel_temperature: see `SlotBinding`.
      count_offset: added to each group's number of tokens in Eq. 5. At 1 a group of n tokens gets
        the weight n / (n + 1) in total.
    """

    num_groups: int
    heads: int
    mlp_ratio: float
    eps: float
    assignment: str
    gumbel_temperature: float
    scale: float | None
    dtype: Any
    matmul_dtype: Any
    mixing_ratio: float = 0.5
    count_offset: float = 1.0

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "B N D"],
        patches: Float[Array, "B L D"],
        train: bool,
        noise: Float[Array, "B L K"] | None = None,
    ) -> Binding:
        """Both inputs come straight from the last layer of the stage.

        Args:
          tokens: the learnable group tokens after that layer.
          patches: what is grouped: image tokens, or an earlier stage's groups.
          train: Gumbel noise on (where the assignment is hard).
          noise: the noise, instead of a draw of the "gumbel" stream. Only read in training.
        """
        width = tokens.shape[-1]
        options = {"dtype": self.dtype, "matmul_dtype": self.matmul_dtype}

        def norm(name: str, x: Array) -> Array:
            return layer_norm(name, self.eps, self.dtype)(x)

        tokens = norm("token_norm", tokens)
        patches = norm("patch_norm", patches)
        hidden = int(width * self.mixing_ratio)
        mixed = TokenMixing(self.num_groups, hidden, name="mixing", **options)(tokens)
        mixed = norm("mixed_norm", mixed)
        mixed = CrossAttentionBlock(self.heads, self.mlp_ratio, self.eps, name="cross", **options)(
            mixed, patches
        )
        query = Dense(width, ("embed", "heads"), name="query", **options)(mixed)
        key = Dense(width, ("embed", "heads"), name="key", **options)(patches)
        value = Dense(width, ("embed", "heads"), name="value", **options)(patches)
        scale = width**-0.5 if self.scale is None else self.scale
        logits = contract("bld,bkd->blk", key, query * scale, self.matmul_dtype)
        affinity = jax.nn.softmax(logits, axis=-1)
        if train and self.assignment == "hard" and noise is None:
            noise = jax.random.gumbel(self.make_rng("gumbel"), logits.shape, logits.dtype)
        assigned = assigned_map(
            logits, self.assignment, noise if train else None, self.gumbel_temperature
        )
        update = weighted_mean(assigned, value, self.matmul_dtype, self.count_offset)
        update = update.astype(self.dtype)
        bound = mixed + Dense(width, ("heads", "embed"), name="out", **options)(update)
        fed = FeedForward(round(width * self.mlp_ratio), name="mlp", **options)(
            norm("mlp_norm", bound)
        )
        return Binding(bound + fed, affinity, assigned, query, key)
