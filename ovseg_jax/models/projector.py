"""Projection to the joint image-text space (Sec. 3.2), optionally with batch normalization."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ovseg_jax.models.layers import Dense, gelu, logical
from ovseg_jax.shapes import Array, Float

ACTIVATIONS = {"gelu": gelu, "relu": jax.nn.relu}

# The collection of running statistics.
STATISTICS = "batch_stats"


class BatchNorm(nn.Module):
    """Batch normalization over every axis but the last (Ioffe & Szegedy, 2015), in float32.

    In training each call normalizes with its own statistics and moves the running ones a step of
    `momentum` towards them: several calls in one training step are several moves, in their order.
    Under jit with a batch that is split over devices, the statistics are the global batch's. Every
    row counts: padding, where tokens are projected, and examples of weight 0.

    The running statistics are `mean`, `variance` (unbiased) and `count`, the number of calls, in
    the collection "batch_stats"; outside training they normalize.
    """

    dtype: Any
    eps: float = 1e-5
    momentum: float = 0.1

    @nn.compact
    def __call__(self, x: Float[Array, "... D"], train: bool) -> Float[Array, "... D"]:
        width = x.shape[-1]
        scale = self.param("scale", logical(nn.initializers.ones, "mlp"), (width,), jnp.float32)
        bias = self.param("bias", logical(nn.initializers.zeros, "mlp"), (width,), jnp.float32)
        running_mean = self.variable(STATISTICS, "mean", jnp.zeros, (width,), jnp.float32)
        running_variance = self.variable(STATISTICS, "variance", jnp.ones, (width,), jnp.float32)
        count = self.variable(STATISTICS, "count", jnp.zeros, (), jnp.int32)
        full = x.astype(jnp.float32).reshape(-1, width)
        if train:
            mean = jnp.mean(full, axis=0)
            centered = full - mean[None]
            variance = jnp.mean(centered * centered, axis=0)
            rows = full.shape[0]
            unbiased = variance * (rows / max(rows - 1, 1))
            for running, new in ((running_mean, mean), (running_variance, unbiased)):
                moved = (1.0 - self.momentum) * running.value + self.momentum * new
                running.value = jax.lax.stop_gradient(moved)
            count.value = count.value + 1
        else:
            mean, variance = running_mean.value, running_variance.value
            centered = full - mean[None]
        y = centered * (jax.lax.rsqrt(variance + self.eps) * scale)[None] + bias[None]
        return y.reshape(x.shape).astype(self.dtype)


class FeatureHead(nn.Module):
    """The embedding of an image's or a sentence's features: two linear maps, a GELU between.

    A contrast of whole images with captions trains it, beside that of the groups, so it need not
    say where anything is. It reads frozen features, which a small data set soon overfits, hence the
    dropout: `rate` on the hidden layer, half of it on the input.
    """

    features: int
    hidden: int
    rate: float
    dtype: Any
    matmul_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "... Dx"], train: bool) -> Float[Array, "... E"]:
        options = {"dtype": self.dtype, "matmul_dtype": self.matmul_dtype}
        x = nn.Dropout(self.rate / 2, deterministic=not train)(x.astype(self.dtype))
        hidden = gelu(Dense(self.hidden, ("embed", "mlp"), name="fc", **options)(x))
        hidden = nn.Dropout(self.rate, deterministic=not train)(hidden)
        return Dense(self.features, ("mlp", "joint"), name="out", **options)(hidden)


class Projector(nn.Module):
    """One linear map, or two with an activation between them.

    Attributes:
      features: E.
      layers: 1 or 2.
      hidden: width between two layers.
      norm: "none", or "batch" for a `BatchNorm` before the activation.
      activation: a key of `ACTIVATIONS`.
      bias: whether the last map has one.
    """

    features: int
    layers: int
    hidden: int
    norm: str
    activation: str
    bias: bool
    dtype: Any
    matmul_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "... D"], train: bool) -> Float[Array, "... E"]:
        options = {"dtype": self.dtype, "matmul_dtype": self.matmul_dtype}
        if self.layers == 2:
            x = Dense(self.hidden, ("embed", "mlp"), name="fc", **options)(x)
            if self.norm == "batch":
                x = BatchNorm(self.dtype, name="norm")(x, train)
            x = ACTIVATIONS[self.activation](x)
        return Dense(self.features, ("mlp", "joint"), name="out", use_bias=self.bias, **options)(x)
