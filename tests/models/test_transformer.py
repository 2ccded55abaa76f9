"""Transformer layers against plain NumPy, with random parameters, and what remat makes again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from reference import transformer as reference

from ovseg_jax.models.layers import DropPath, contract
from ovseg_jax.models.transformer import PreNormStack
from ovseg_jax.train.metrics import matmul_flops

B, M, K = 3, 7, 4
KEEP = jnp.asarray(np.arange(M)[None] < np.array([M, 4, 1])[:, None])


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def random_parameters(module, *args):
    """Every parameter random: at their initial 0 and 1 biases and scales could be left out."""
    boxed = jax.eval_shape(lambda key: module.init(key, *args)["params"], jax.random.key(0))
    rng = np.random.default_rng(0)
    draw = lambda x: 0.5 * rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, nn.unbox(boxed))


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("layer_scale", [None, 1.0])
def test_pre_norm_layers(layer_scale):
    stack = PreNormStack(2, 2, 2.0, 1e-6, layer_scale)
    x = normal(1, B, M, 8)
    params = random_parameters(stack, x, False)
    assert ("attention_scale" in params["layers"]) == (layer_scale is not None)
    got = jax.jit(lambda p: stack.apply({"params": p}, x, False))(params)
    for b in range(B):
        want = np.asarray(x[b], np.float64)
        for index in range(2):
            layer = reference.layer_of(params["layers"], index)
            want = reference.pre_norm_layer(layer, want, heads=2, eps=1e-6)
        close(got[b], want)


def gradient_of_stack(remat):
    """The gradient as a function, and the parameters to take it at."""
    x = normal(1, B, M, 8)
    stack = PreNormStack(2, 2, 2.0, 1e-6, remat=remat)
    params = random_parameters(stack, x, False)
    return jax.grad(lambda p: jnp.sum(stack.apply({"params": p}, x, False) ** 2)), params


@pytest.mark.parametrize("remat", ["full", "dots", "dense"])
def test_remat_changes_nothing(remat):
    plain, params = gradient_of_stack("none")
    other, _ = gradient_of_stack(remat)
    plain, other = jax.jit(plain)(params), jax.jit(other)(params)
    assert jax.tree.structure(plain) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_what_remat_makes_again():
    """In matrix products: nothing, those of attention alone, or the whole forward pass."""
    none, dots, dense, full = (
        matmul_flops(*gradient_of_stack(remat)) for remat in ("none", "dots", "dense", "full")
    )
    attention = 2 * 2 * (2 * B * M * M * 8)  # two layers: logits, and values mixed by them
    maps = 2 * (2 * B * M * 8 * (4 * 8 + 2 * 16))
    assert none == pytest.approx(3 * (attention + maps), rel=0.05)
    assert 0 < dots - none <= attention and dots == dense
    assert full - none > 0.7 * (attention + maps)  # the last map of a layer is not needed


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_contract_and_its_gradients(dtype):
    a, b, g = normal(6, 5, 4), normal(7, 4, 3), normal(8, 5, 3)
    rounded = [np.asarray(jnp.asarray(x).astype(dtype).astype(jnp.float32)) for x in (a, b, g)]
    value, pull = jax.vjp(lambda a, b: contract("nd,df->nf", a, b, dtype), a, b)
    assert value.dtype == jnp.float32  # accumulated and left there, also for bfloat16 operands
    np.testing.assert_allclose(value, rounded[0] @ rounded[1], rtol=1e-5, atol=1e-5)
    # A CPU multiplies some gradients in float32 all the same: theirs may miss the rounding.
    limit = 1e-5 if dtype == jnp.float32 else 0.03
    grad_a, grad_b = pull(g)
    np.testing.assert_allclose(grad_a, rounded[2] @ rounded[1].T, atol=limit)
    np.testing.assert_allclose(grad_b, rounded[0].T @ rounded[2], atol=limit)


def test_drop_path_drops_whole_examples_and_keeps_the_mean():
    x = jnp.ones((4000, 2, 3))
    rngs = {"dropout": jax.random.key(0)}
    y = np.asarray(DropPath().apply({}, x, jnp.float32(0.25), True, rngs=rngs))
    assert (y == y[:, :1, :1]).all() and set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    assert abs(y.mean() - 1) < 0.04
    np.testing.assert_array_equal(DropPath().apply({}, x, jnp.float32(0.25), False), x)
