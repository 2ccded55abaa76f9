"""Transformer layers, the cross-attention block, and scanned stacks of identical layers.

A stack's parameters have a leading "layers" axis; one layer is compiled, whatever the depth.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ovseg_jax.models.layers import (
    DENSE,
    DropPath,
    FeedForward,
    Floats,
    LayerNorm,
    LayerScale,
    MultiHeadAttention,
    gelu,
)
from ovseg_jax.shapes import Array, Bool, Float

# What the backward pass finds of each layer; the rest it makes again. "none": everything. "dots":
# the products of dense maps, float32, as they leave the accumulator. "dense": the same products as
# activations, with bias: half of that in bfloat16. "full": the layer's input alone.
REMAT_POLICIES = {
    "none": None,
    "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
    "dense": jax.checkpoint_policies.save_only_these_names(DENSE),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class PreNormLayer(Floats):
    """Pre-norm Transformer encoder layer, `x += MHSA(LN(x)); x += FFN(LN(x))` (Sec. 3.1.1).

    Attributes:
      layer_scale: initial value of a per-channel factor on both branches, None for none.
      drop_path: whether the layer is built with stochastic depth at all.
      rotary, causal: see `MultiHeadAttention`.
      keep: the scan over layers keeps this layer's output.
    """

    heads: int
    mlp_ratio: float
    eps: float
    layer_scale: float | None = None
    drop_path: bool = False
    train: bool = False
    rotary: Callable[[Array], Array] | None = None
    causal: bool = False
    activation: Callable[[Array], Array] = gelu
    keep: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        rate: Float[Array, ""],
        mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Array, Array | None]:
        """`rate` is the stochastic depth's; tokens where `mask` is False are never looked at."""

        def add(x: Array, branch: Array, name: str) -> Array:
            if self.layer_scale is not None:
                branch = LayerScale(self.layer_scale, name=f"{name}_scale")(branch)
            if self.drop_path:
                branch = DropPath(name=f"{name}_drop")(branch, rate, self.train)
            return x + branch

        normed = LayerNorm(self.eps, self.dtype, name="attention_norm")(x)
        attention = MultiHeadAttention(self.heads, self.causal, name="attention", **self.floats)
        x = add(x, attention(normed, normed, mask, rotary=self.rotary), "attention")
        normed = LayerNorm(self.eps, self.dtype, name="mlp_norm")(x)
        hidden = round(x.shape[-1] * self.mlp_ratio)
        x = add(x, FeedForward(hidden, self.activation, name="mlp", **self.floats)(normed), "mlp")
        return x, x if self.keep else None


class PostNormLayer(Floats):
    """BERT's encoder layer, `x = LN(x + MHSA(x)); x = LN(x + FFN(x))` (Devlin et al., 2019)."""

    heads: int
    mlp_width: int
    eps: float
    dropout: float
    train: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B M D"], mask: Bool[Array, "B M"]) -> tuple[Array, None]:
        drop = nn.Dropout(self.dropout, deterministic=not self.train)
        attended = MultiHeadAttention(self.heads, name="attention", **self.floats)(x, x, mask)
        x = LayerNorm(self.eps, self.dtype, name="attention_norm")(x + drop(attended))
        fed = FeedForward(self.mlp_width, name="mlp", **self.floats)(x)
        return LayerNorm(self.eps, self.dtype, name="mlp_norm")(x + drop(fed)), None


def scanned(layer: type[nn.Module], depth: int, *, in_axes: Any, remat: str) -> Any:
    """`layer` repeated `depth` times as one scan over a leading "layers" axis of its parameters.

    The layer maps (carry, argument) to (carry, output or None). `in_axes` is the argument's scan
    axis or `nn.broadcast`, `remat` a key of `REMAT_POLICIES`.
    """
    if remat != "none":
        layer = nn.remat(layer, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=depth,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


class PreNormStack(Floats):
    """`depth` pre-norm layers; an empty stack is the identity and owns no parameter.

    Attributes:
      drop_rates: stochastic-depth rate of each layer; () for 0.
      outputs: layers (1 is the first) whose outputs are returned, stacked; () for the last one's.
      remat: see `scanned`. The others: see `PreNormLayer`.
    """

    depth: int
    heads: int
    mlp_ratio: float
    eps: float
    layer_scale: float | None = None
    drop_rates: tuple[float, ...] = ()
    remat: str = "none"
    causal: bool = False
    activation: Callable[[Array], Array] = gelu
    outputs: tuple[int, ...] = ()

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], train: bool, rotary: Callable[[Array], Array] | None = None
    ) -> Float[Array, "B T D"] | Float[Array, "outputs B T D"]:
        if self.depth == 0:
            return x
        rates = self.drop_rates or (0.0,) * self.depth
        layers = scanned(PreNormLayer, self.depth, in_axes=0, remat=self.remat)(
            self.heads,
            self.mlp_ratio,
            self.eps,
            self.layer_scale,
            drop_path=any(rate > 0 for rate in rates),
            train=train,
            rotary=rotary,
            causal=self.causal,
            activation=self.activation,
            keep=bool(self.outputs),
            name="layers",
            **self.floats,
        )
        x, kept = layers(x, jnp.asarray(rates, jnp.float32))
        return kept[np.array(self.outputs) - 1] if self.outputs else x


class CrossAttentionBlock(Floats):
    """`q += MHA(q, x); q += FFN(LN(q)); q = LN(q)`, as in GroupViT (Xu et al., 2022).

    Queries and context come in normalized: the block has no LayerNorm in front of its attention.
    """

    heads: int
    mlp_ratio: float
    eps: float

    @nn.compact
    def __call__(
        self, queries: Float[Array, "B Q D"], context: Float[Array, "B T Dc"]
    ) -> Float[Array, "B Q D"]:
        attention = MultiHeadAttention(self.heads, name="attention", **self.floats)
        x = queries + attention(queries, context)
        hidden = round(queries.shape[-1] * self.mlp_ratio)
        normed = LayerNorm(self.eps, self.dtype, name="mlp_norm")(x)
        x = x + FeedForward(hidden, name="mlp", **self.floats)(normed)
        return LayerNorm(self.eps, self.dtype, name="norm")(x)
