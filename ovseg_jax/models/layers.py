"""The layers that every tower is made of: dense map, attention, feed-forward, norm, drop path.

Parameters carry logical axis names ("embed", "mlp", "heads", "vocab", "joint", "layers");
`ovseg_jax.sharding` turns the names into mesh axes.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from ovseg_jax import platforms
from ovseg_jax.shapes import Array, Bool, Float

# What policies of rematerialization call the result of a `Dense`.
DENSE = "dense"

TRUNCATED_NORMAL = nn.initializers.truncated_normal(0.02)

_EVERY_PLATFORM = contextvars.ContextVar("every_platform", default=False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def contract(spec: str, a: Array, b: Array, dtype: Any) -> Array:
    """`einsum(spec, a, b)` with operands rounded to `dtype` and a float32 accumulator.

    So are both backward contractions: otherwise the float32 cotangent would meet a bfloat16 operand
    and leave the fast path of the hardware. Every letter of an operand must also occur in the other
    operand or in the output, so that each gradient is again one contraction.
    """
    return _product(spec, a, b, dtype)


def _product(spec: str, a: Array, b: Array, dtype: Any) -> Array:
    def einsum(a: Array, b: Array, dtype: Any = dtype) -> Array:
        a, b = a.astype(dtype), b.astype(dtype)
        return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)

    if dtype != jnp.float32 and not _is_fast_on_cpu(spec):
        exact = functools.partial(einsum, dtype=jnp.float32)
        if _EVERY_PLATFORM.get():
            return jax.lax.platform_dependent(a, b, cpu=exact, default=einsum)
        if platforms.target() == "cpu":
            return exact(a, b)
    return einsum(a, b)


@contextlib.contextmanager
def every_platform() -> Iterator[None]:
    """Within it `contract` traces programs that are right on every platform, for a file.

    The choice inside the program hides its products from policies of rematerialization.
    """
    token = _EVERY_PLATFORM.set(True)
    try:
        yield
    finally:
        _EVERY_PLATFORM.reset(token)


def _is_fast_on_cpu(spec: str) -> bool:
    # XLA's CPU backend has no bfloat16 x bfloat16 = float32 for some batched products, and a slow
    # one where the sum runs over rows (a kernel's gradient).
    operands, out = spec.split("->")
    left, right = operands.split(",")
    return not set(left) & set(right) & set(out) and left[-1] not in out


def _contract_forward(spec: str, a: Array, b: Array, dtype: Any) -> tuple[Array, tuple]:
    # Not `contract` itself, within which policies of rematerialization would see no product.
    return _product(spec, a, b, dtype), (a, b)


def _contract_backward(spec: str, dtype: Any, residuals: tuple, cotangent: Array) -> tuple:
    a, b = residuals
    operands, out = spec.split("->")
    left, right = operands.split(",")
    grad_a = contract(f"{out},{right}->{left}", cotangent, b, dtype)
    grad_b = contract(f"{left},{out}->{right}", a, cotangent, dtype)
    return grad_a.astype(a.dtype), grad_b.astype(b.dtype)


contract.defvjp(_contract_forward, _contract_backward)


def parameter(
    module: nn.Module, name: str, start: Any, shape: tuple[int, ...], *axes: str | None
) -> Any:
    """A float32 parameter of a module, with an initializer and the logical names of its axes."""
    return module.param(name, nn.with_logical_partitioning(start, axes), shape, jnp.float32)


def embeddings(module: nn.Module, name: str, rows: int, width: int, axis: str | None = None) -> Any:
    """A table of embeddings, a parameter of a module."""
    return parameter(module, name, TRUNCATED_NORMAL, (rows, width), axis, "embed")


class Floats(nn.Module, kw_only=True):
    """A module with a dtype of activations and one of the operands of matrix products."""

    dtype: Any = jnp.float32
    matmul_dtype: Any = jnp.float32

    @property
    def floats(self) -> dict[str, Any]:
        """Both, for the modules inside."""
        return {"dtype": self.dtype, "matmul_dtype": self.matmul_dtype}


def rows_split(x: Array) -> Array:
    """An activation, its first axis (examples) pinned to `sharding.BATCH_AXES` under fsdp.

    The partitioner would move activations in place of parameters, at four times the memory of a
    ViT-B step on 16 chips. Without an fsdp axis in the trace's mesh, pins only cost memory.
    """
    mesh = jax.sharding.get_abstract_mesh()
    split = mesh.shape.get("fsdp", 1)
    if mesh.empty or split == 1 or x.shape[0] % (mesh.shape["data"] * split):
        return x
    rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(("data", "fsdp"), *rest))


class Dense(Floats):
    """Linear map over the last axis, `x W + b`; `axes` are the logical names of the kernel's."""

    features: int
    axes: tuple[str | None, str | None] = ("embed", "mlp")
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "... d_in"]) -> Float[Array, "... d_out"]:
        x, width = rows_split(x), x.shape[-1]
        start = nn.initializers.xavier_uniform()
        kernel = parameter(self, "kernel", start, (width, self.features), *self.axes)
        # Flattened: on CPU the gradient over [B, L, D] runs several times slower.
        y = contract("nd,df->nf", x.reshape(-1, width), kernel, self.matmul_dtype)
        if self.use_bias:
            zeros = nn.initializers.zeros
            y = y + parameter(self, "bias", zeros, (self.features,), self.axes[1])[None]
        y = y.reshape(*x.shape[:-1], self.features).astype(self.dtype)
        return checkpoint_name(rows_split(y), DENSE)


class LayerNorm(nn.Module):
    """LayerNorm over the last axis; all of it in float32, biased variance.

    Flax's own leaves the precision to dtype promotion, and fails where promotion is strict.
    """

    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        shape, ones = (x.shape[-1],), (1,) * (x.ndim - 1)
        scale = parameter(self, "scale", nn.initializers.ones, shape, "embed").reshape(*ones, -1)
        bias = parameter(self, "bias", nn.initializers.zeros, shape, "embed").reshape(*ones, -1)
        full = x.astype(jnp.float32)
        centered = full - jnp.mean(full, axis=-1, keepdims=True)
        # Not E[x^2] - E[x]^2, which loses digits.
        variance = jnp.mean(centered * centered, axis=-1, keepdims=True)
        return (centered * jax.lax.rsqrt(variance + self.eps) * scale + bias).astype(self.dtype)


# With the error function, as BERT and DINO were trained with (not the tanh form).
gelu = functools.partial(jax.nn.gelu, approximate=False)


def quick_gelu(x: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """The approximation `x sigmoid(1.702 x)` that CLIP's text encoder was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


class MultiHeadAttention(Floats):
    """Scaled dot-product attention (Vaswani et al., 2017); if `causal`, no token looks ahead."""

    heads: int
    causal: bool = False

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "B Q D"],
        context: Float[Array, "B T Dc"],
        mask: Bool[Array, "B T"] | None = None,
        rotary: Callable[[Array], Array] | None = None,
    ) -> Float[Array, "B Q D"]:
        """Attends to the context where `mask` is True; `rotary` turns queries and keys first."""
        width = queries.shape[-1]
        query = self._heads("query", queries, width)
        key, value = (self._heads(name, context, width) for name in ("key", "value"))
        if rotary is not None:
            query, key = rotary(query), rotary(key)
        scale = (width // self.heads) ** -0.5
        logits = contract("bnqd,bntd->bnqt", query * scale, key, self.matmul_dtype)
        if mask is not None:
            logits = jnp.where(mask[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
        if self.causal:
            earlier = jnp.tril(jnp.ones(logits.shape[-2:], bool))
            logits = jnp.where(earlier[None, None], logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1)
        mixed = contract("bnqt,bntd->bnqd", weights, value, self.matmul_dtype)
        mixed = mixed.astype(self.dtype).transpose(0, 2, 1, 3).reshape(queries.shape)
        return Dense(width, ("heads", "embed"), name="out", **self.floats)(mixed)

    def _heads(self, name: str, x: Float[Array, "B T Dx"], width: int) -> Float[Array, "B N T d"]:
        # Heads before tokens: the batched products of attention are then plain row-major ones.
        y = Dense(width, ("embed", "heads"), name=name, **self.floats)(x)
        return y.reshape(*x.shape[:2], self.heads, -1).transpose(0, 2, 1, 3)


class FeedForward(Floats):
    """Two dense maps with an activation, `hidden` wide between them."""

    hidden: int
    activation: Callable[[Array], Array] = gelu

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        hidden = Dense(self.hidden, ("embed", "mlp"), name="fc1", **self.floats)(x)
        last = Dense(x.shape[-1], ("mlp", "embed"), name="fc2", **self.floats)
        return last(self.activation(hidden))


class LayerScale(nn.Module):
    """Learned per-channel factor on a residual branch (Touvron et al., 2021)."""

    initial: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        start = nn.initializers.constant(self.initial)
        scale = parameter(self, "scale", start, (x.shape[-1],), "embed")
        return x * scale.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


class DropPath(nn.Module):
    """Drops a residual branch for whole examples, scaling the kept ones (Huang et al., 2016)."""

    @nn.compact
    def __call__(
        self, x: Float[Array, "B *rest"], rate: Float[Array, ""], train: bool
    ) -> Float[Array, "B *rest"]:
        if not train:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        kept = jax.random.uniform(self.make_rng("dropout"), shape) >= rate
        return x * kept.astype(x.dtype) / jnp.maximum(1.0 - rate, 1e-6).astype(x.dtype)
