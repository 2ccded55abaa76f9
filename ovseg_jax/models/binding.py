"""Binding: each patch is claimed by a group.

`SlotBinding` is the paper's (Sec. 3.1.1, Eq. 3-6). `GroupingBlock` is GroupViT's (Xu et al., 2022),
which the released model uses. `GroupingStage` groups segments again.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from ovseg_jax.models.layers import Dense, FeedForward, Floats, LayerNorm, contract, gelu, parameter
from ovseg_jax.models.transformer import CrossAttentionBlock, PreNormStack
from ovseg_jax.shapes import Array, Float

# A group whose patches weigh less than this in total counts as empty.
EMPTY = 1e-6


@struct.dataclass
class Binding:
    """The bound groups (Eq. 6), and what bound them.

    Attributes:
      affinity: the soft map of Eq. 4, without noise.
      assigned: the weights of Eq. 5: `affinity`, or where the assignment is hard, one-hot with the
        gradient of a noisy softmax.
      query, key: the two sides of Eq. 4's product.
    """

    groups: Float[Array, "B K D"]
    affinity: Float[Array, "B L K"]
    assigned: Float[Array, "B L K"]
    query: Float[Array, "B K D"]
    key: Float[Array, "B L D"]


def straight_through(soft: Float[Array, "B L K"]) -> Float[Array, "B L K"]:
    """One-hot of the first largest entry forward, the gradient of `soft` backward."""
    hard = jax.nn.one_hot(jnp.argmax(soft, axis=-1), soft.shape[-1], dtype=soft.dtype)
    return (hard - jax.lax.stop_gradient(soft)) + soft


def weighted_mean(
    assignment: Float[Array, "B L K"],
    values: Float[Array, "B L D"],
    matmul_dtype: Any,
    count_offset: float = 0.0,
) -> Float[Array, "B K D"]:
    """Eq. 5: mean of the patches' values, weighted by their assignment to each group.

    `count_offset` is added to the sum of weights that Eq. 5 divides by. An empty group gives 0.
    """
    # The denominator is replaced: a selection after the division leaves NaN in the backward pass.
    total = jnp.sum(assignment, axis=1) + count_offset
    occupied = total > EMPTY
    weighted = contract("blk,bld->bkd", assignment, values, matmul_dtype)
    safe = jnp.where(occupied, total, 1.0)
    return jnp.where(occupied[..., None], weighted / safe[..., None], 0.0)


class Assignment(Floats):
    """Eq. 3-5 with learned maps, and the residual of Eq. 6: what both forms of binding share.

    `assignment` is "hard" (one-hot forward, soft gradient; Gumbel noise in training) or "soft".
    """

    assignment: str
    eps: float

    def bind(
        self,
        tokens: Float[Array, "B K D"],
        normed: Float[Array, "B K D"],
        patches: Float[Array, "B L D"],
        train: bool,
        noise: Float[Array, "B L K"] | None,
        *,
        scaled: str,
        count_offset: float,
    ) -> Binding:
        """Assigns patches to tokens, and adds to each token what its patches say.

        Args:
          normed: the tokens as queries. patches: normalized too.
          noise: stands in for a draw of the "gumbel" stream, in training only.
          scaled: the side of the product that takes the scale, "query" or "key". It shows in the
            last digits, and weights were trained with either.
          count_offset: see `weighted_mean`.
        """
        width = tokens.shape[-1]
        query = Dense(width, ("embed", "heads"), name="query", **self.floats)(normed)
        key = Dense(width, ("embed", "heads"), name="key", **self.floats)(patches)
        value = Dense(width, ("embed", "heads"), name="value", **self.floats)(patches)
        # The paper prints no factor on K.Q; the released code has that of attention.
        scale = width**-0.5
        sides = (key * scale, query) if scaled == "key" else (key, query * scale)
        logits = contract("bld,bkd->blk", *sides, self.matmul_dtype)
        affinity = jax.nn.softmax(logits, axis=-1)  # over groups: a patch is shared out among them
        assigned = affinity
        if self.assignment == "hard":
            if train and noise is None:
                noise = jax.random.gumbel(self.make_rng("gumbel"), logits.shape, logits.dtype)
            noisy = jax.nn.softmax(logits + noise, axis=-1) if train else affinity
            assigned = straight_through(noisy)
        update = weighted_mean(assigned, value, self.matmul_dtype, count_offset).astype(self.dtype)
        bound = tokens + Dense(width, ("heads", "embed"), name="out", **self.floats)(update)
        return Binding(bound, affinity, assigned, query, key)


class SlotBinding(Assignment):
    """Binds patches to groups in one pass (no recurrence), Eq. 3-6.

    Inputs are normalized first, as in slot attention (Locatello et al., 2020); the paper prints the
    linear maps only.
    """

    @nn.compact
    def __call__(
        self, groups: Array, patches: Array, train: bool, noise: Array | None = None
    ) -> Binding:
        """Eq. 3-6; the arguments are those of `Assignment.bind`."""
        normed = LayerNorm(self.eps, self.dtype, name="group_norm")(groups)
        patches = LayerNorm(self.eps, self.dtype, name="patch_norm")(patches)
        return self.bind(groups, normed, patches, train, noise, scaled="key", count_offset=0.0)


class TokenMixing(Floats):
    """A feed-forward over the token axis: N tokens in, `tokens` out, every channel alike."""

    tokens: int
    hidden: int

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B K D"]:
        x = x.transpose(0, 2, 1)
        x = gelu(Dense(self.hidden, (None, "mlp"), name="fc1", **self.floats)(x))
        x = Dense(self.tokens, ("mlp", None), name="fc2", **self.floats)(x)
        return x.transpose(0, 2, 1)


class GroupingBlock(Assignment):
    """Binds image tokens to K groups made of N learnable tokens.

    The tokens are mixed down to K, attend to the image tokens, and are then assigned to (Eq. 3-5,
    with a single head); the bound groups pass a feed-forward.
    """

    num_groups: int
    heads: int
    mlp_ratio: float

    @nn.compact
    def __call__(
        self, tokens: Array, patches: Array, train: bool, noise: Array | None = None
    ) -> Binding:
        """Binds L patches (image tokens, or groups) to N tokens; see `Assignment.bind`."""
        width, sizes = tokens.shape[-1], (self.heads, self.mlp_ratio, self.eps)
        tokens = LayerNorm(self.eps, self.dtype, name="token_norm")(tokens)
        patches = LayerNorm(self.eps, self.dtype, name="patch_norm")(patches)
        mixed = TokenMixing(self.num_groups, width // 2, name="mixing", **self.floats)(tokens)
        mixed = LayerNorm(self.eps, self.dtype, name="mixed_norm")(mixed)
        mixed = CrossAttentionBlock(*sizes, name="cross", **self.floats)(mixed, patches)
        # In Eq. 5 a group of n tokens gets the weight n / (n + 1) in total.
        bound = self.bind(mixed, mixed, patches, train, noise, scaled="query", count_offset=1.0)
        normed = LayerNorm(self.eps, self.dtype, name="mlp_norm")(bound.groups)
        fed = FeedForward(round(width * self.mlp_ratio), name="mlp", **self.floats)(normed)
        return bound.replace(groups=bound.groups + fed)


class GroupingStage(Floats):
    """Layers over the segments of the stage before and new group tokens, then a grouping block.

    The new tokens start from what the earlier stage's tokens became: their own learned part (zero
    at first) plus a token mixing of those.
    """

    tokens: int
    layers: PreNormStack
    block: GroupingBlock
    eps: float

    @nn.compact
    def __call__(self, segments: Array, earlier: Array, train: bool) -> tuple[Binding, Array]:
        """The binding of segments to groups, and this stage's tokens [B, N, D] before it.

        Args:
          segments: groups of the stage before, [B, ., D].
          earlier: its group tokens, as its grouping block saw them, [B, ., D].
        """
        count, width = segments.shape[1:]
        zeros = nn.initializers.zeros
        learned = parameter(self, "group_token", zeros, (self.tokens, width), None, "embed")
        normed = LayerNorm(self.eps, self.dtype, name="projector_norm")(earlier)
        mixing = TokenMixing(self.tokens, width // 2, name="projector", **self.floats)
        tokens = learned[None].astype(self.dtype) + mixing(normed)
        x = self.layers(jnp.concatenate([segments, tokens], axis=1), train)
        tokens = x[:, count:]
        return self.block(tokens, x[:, :count], train), tokens
