"""Batch normalization: statistics of each call, of the global batch, and their running mixture."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ovseg_jax import sharding
from ovseg_jax.models.ovsegmentor import Projector

B, T, D = 16, 3, 5
PROJECTOR = Projector(4, 2, 6, "batch", "relu", True)
RNG = np.random.default_rng(0)
X, POOLED = (RNG.normal(size=s).astype(np.float32) for s in ((B, T, D), (B, D)))


@pytest.fixture(scope="module")
def variables():
    boxed = jax.eval_shape(lambda: PROJECTOR.init(jax.random.key(0), jnp.asarray(X), False))
    rng = np.random.default_rng(1)
    draw = lambda x: rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
    norm = {"mean": draw(np.empty(6)), "variance": np.float32([0.5, 1, 2, 3, 1, 1])}
    return {
        "params": jax.tree.map(draw, nn.unbox(boxed["params"])),
        "batch_stats": {"norm": {**norm, "count": np.int32(3)}},
    }


def hidden(variables, x):
    dense = variables["params"]["fc"]
    return np.float64(x.reshape(-1, D)) @ dense["kernel"] + dense["bias"]


def finish(variables, normed, shape):
    norm, out = (variables["params"][name] for name in ("norm", "out"))
    y = np.maximum(normed * norm["scale"] + norm["bias"], 0)
    return (y @ out["kernel"] + out["bias"]).reshape(*shape[:-1], 4)


def twice(variables, pooled, tokens):
    """Two calls in training, the second from the statistics that the first left."""
    first, moved = PROJECTOR.apply(variables, pooled, True, mutable=["batch_stats"])
    second, moved = PROJECTOR.apply({**variables, **moved}, tokens, True, mutable=["batch_stats"])
    return first, second, moved["batch_stats"]["norm"]


def test_each_call_has_its_own_statistics_and_moves_the_running_ones(variables):
    first, second, moved = jax.jit(twice)(variables, POOLED, X)
    running = variables["batch_stats"]["norm"]
    mean, variance = np.float64(running["mean"]), np.float64(running["variance"])
    for got, x in ((first, POOLED), (second, X)):
        h = hidden(variables, x)
        normed = (h - h.mean(0)) / np.sqrt(h.var(0) + 1e-5)
        np.testing.assert_allclose(got, finish(variables, normed, x.shape), rtol=1e-4, atol=1e-4)
        mean, variance = 0.9 * mean + 0.1 * h.mean(0), 0.9 * variance + 0.1 * h.var(0, ddof=1)
    np.testing.assert_allclose(moved["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(moved["variance"], variance, rtol=1e-5)
    assert moved["count"] == 5


def test_outside_training_the_running_statistics_normalize(variables):
    got = jax.jit(lambda v: PROJECTOR.apply(v, jnp.asarray(X), False))(variables)
    running = variables["batch_stats"]["norm"]
    normed = (hidden(variables, X) - running["mean"]) / np.sqrt(running["variance"] + 1e-5)
    np.testing.assert_allclose(got, finish(variables, normed, X.shape), rtol=1e-4, atol=1e-4)


def test_a_batch_split_over_devices_has_the_statistics_of_the_whole(variables):
    mesh = sharding.make_mesh()
    assert mesh.size == 8
    rows = sharding.batch_sharding(mesh)
    split = jax.jit(twice, in_shardings=(sharding.replicated(mesh), rows, rows))
    got, want = split(variables, POOLED, X), jax.jit(twice)(variables, POOLED, X)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_no_gradient_comes_through_the_running_statistics(variables):
    def moved(params):
        norm = twice({**variables, "params": params}, jnp.asarray(POOLED), jnp.asarray(X))[2]
        return jnp.sum(norm["mean"]) + jnp.sum(norm["variance"])

    for leaf in jax.tree.leaves(jax.jit(jax.grad(moved))(variables["params"])):
        np.testing.assert_array_equal(leaf, 0)
