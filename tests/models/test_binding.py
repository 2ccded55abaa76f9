"""Eq. 3-6 against plain NumPy, hard and soft, and what happens to a group without patches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from reference import transformer as reference

from ovseg_jax.models.binding import SlotBinding, straight_through, weighted_mean

B, L, K, D = 3, 6, 4, 8


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"groups": (B, K, D), "patches": (B, L, D)}
    return {name: jnp.asarray(rng.normal(size=x), jnp.float32) for name, x in shapes.items()}


@pytest.fixture(scope="module")
def params():
    start = jax.eval_shape(
        lambda: SlotBinding("soft", 1e-6).init(jax.random.key(0), **inputs(), train=False)
    )["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), nn.unbox(start))


def run(assignment, params, case, train=False):
    module, rngs = SlotBinding(assignment, 1e-6), {"gumbel": jax.random.key(0)}
    return jax.jit(lambda p: module.apply({"params": p}, **case, train=train, rngs=rngs))(params)


@pytest.mark.parametrize("assignment", ["hard", "soft"])
def test_equations_3_to_6(params, assignment):
    case = inputs()
    binding = run(assignment, params, case)
    bound, affinity = binding.groups, binding.affinity
    used = []
    for b in range(B):
        want, soft = reference.binding(
            params,
            *(np.asarray(x[b]) for x in case.values()),
            eps=1e-6,
            scale=D**-0.5,
            hard=assignment == "hard",
        )
        np.testing.assert_allclose(bound[b], want, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(affinity[b], soft, rtol=1e-3, atol=1e-5)
        used.append(len(set(soft.argmax(1))))
    assert min(used) < K, "no group of any example is empty: the case tests less than it should"


def test_mean_of_an_empty_group():
    assignment = jnp.asarray([[[1.0, 0.0], [1.0, 0.0]]])
    values = jnp.asarray([[[1.0, 2.0], [3.0, 6.0]]])

    def mean(a, v):
        return weighted_mean(a, v, jnp.float32)

    np.testing.assert_allclose(mean(assignment, values), [[[2, 4], [0, 0]]])
    grads = jax.grad(lambda a, v: jnp.sum(mean(a, v)), argnums=(0, 1))(assignment, values)
    assert all(np.isfinite(g).all() for g in grads)
    np.testing.assert_allclose(grads[1], 0.5 * np.ones((1, 2, 2)))


def test_straight_through_is_one_hot_forward_and_the_softmax_backward():
    logits = np.random.default_rng(3).normal(size=(B, L, K)).astype(np.float32)
    weights = np.random.default_rng(4).normal(size=(B, L, K)).astype(np.float32)
    hard = straight_through(jax.nn.softmax(logits))
    np.testing.assert_allclose(hard, np.eye(K)[logits.argmax(-1)], atol=1e-6)
    got = jax.grad(lambda x: jnp.sum(straight_through(jax.nn.softmax(x)) * weights))(logits)
    want = jax.grad(lambda x: jnp.sum(jax.nn.softmax(x) * weights))(logits)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
    ties = np.asarray(straight_through(jnp.full((1, 1, K), 0.25)))
    np.testing.assert_array_equal(ties, [[[1, 0, 0, 0]]])


def test_gumbel_noise_assigns_in_proportion_to_the_affinity(params):
    count = 4000
    case = {name: jnp.repeat(x[:1], count, 0) for name, x in inputs().items()}
    case["patches"] = case["patches"][:, :1]  # one patch, so that one group is updated
    noisy = run("hard", params, case, train=True)
    bound, affinity = noisy.groups, noisy.affinity
    # The map that inference reads is Eq. 4's, without noise.
    quiet = run("hard", params, case).affinity
    np.testing.assert_allclose(affinity, quiet, rtol=1e-5)
    idle = np.asarray(case["groups"]) + params["out"]["bias"]
    claimed = np.abs(np.asarray(bound) - idle).max(-1) > 1e-4
    assert (claimed.sum(1) == 1).all()
    share, wanted = claimed.mean(0), np.asarray(quiet[0, 0])
    assert (np.abs(share - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / count) + 1e-3).all()
