"""Bipartite matching (Eq. 11): every backend against SciPy, split over the mesh, and large."""

import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.optimize import linear_sum_assignment

from ovseg_jax import sharding
from ovseg_jax.losses.matching import BACKENDS, match

N = 16


def costs(size, kind="random"):
    rng = np.random.default_rng(size)
    drawn = {
        "equal": np.full((N, size, size), 0.7),
        "duplicate rows": np.repeat(rng.normal(size=(N, 1, size)), size, axis=1),
        "few values": rng.integers(-1, 2, (N, size, size)),
        "random": rng.normal(size=(N, size, size)),
    }
    return drawn[kind].astype(np.float32)


def is_permutation(found):
    return (np.sort(found, axis=1) == np.arange(found.shape[1])).all()


def total(cost, permutation):
    return np.take_along_axis(cost, np.asarray(permutation)[..., None], 2)[..., 0].sum(1)


def least(cost):
    return np.array([c[linear_sum_assignment(c)].sum() for c in cost])


@functools.cache
def matcher(backend):
    """Compiled once per shape."""
    return jax.jit(functools.partial(match, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1, 4])
def test_total_cost_is_scipys(backend, size):
    for kind in ("random", "equal", "duplicate rows", "few values"):
        cost = costs(size, kind)
        found = matcher(backend)(cost)
        assert found.dtype == jnp.int32 and is_permutation(found), kind
        np.testing.assert_allclose(total(cost, found), least(cost), atol=1e-5, err_msg=kind)
    # A unique optimum is one permutation, not merely one cost: its direction shows as well.
    cost = costs(size)
    want = [linear_sum_assignment(c)[1] for c in cost]
    np.testing.assert_array_equal(matcher(backend)(cost), want)


FEW_VALUES = st.sampled_from([-1.0, -0.5, 0.0, 0.25, 1.0])


@given(arrays.arrays(np.float32, (N, 4, 4), elements=FEW_VALUES))
def test_backends_agree_on_costs_full_of_ties(cost):
    want = least(cost)
    for backend in BACKENDS:
        found = matcher(backend)(cost)
        assert is_permutation(found)
        np.testing.assert_allclose(total(cost, found), want, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_cost_spoils_only_its_own_problem(backend, bad):
    cost = costs(4)
    cost[3, 1, 2] = bad
    cost[5] = bad
    found = np.asarray(matcher(backend)(cost))
    assert is_permutation(found)
    good = [i for i in range(N) if i not in (3, 5)]
    np.testing.assert_allclose(total(cost[good], found[good]), least(cost[good]), atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sharded_costs_are_solved_where_they_lie(backend):
    mesh, cost = sharding.make_mesh(data=4, fsdp=2), costs(4)
    split = sharding.batch_sharding(mesh)
    options = {"in_shardings": split, "out_shardings": split}
    run = jax.jit(lambda c: match(jnp.sin(c), backend, mesh), **options)
    run = run.lower(jax.ShapeDtypeStruct((N, 4, 4), jnp.float32)).compile()
    found = run(jax.device_put(cost, split))
    np.testing.assert_allclose(total(np.sin(cost), found), least(np.sin(cost)), atol=1e-5)
    if backend != "host":
        return
    text = run.as_text()
    assert "custom-call" in text, "the callback is not in the program"
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in text, f"the costs travel between devices: {collective}"


def test_an_empty_batch_has_no_permutation():
    assert match(jnp.zeros((0, 4, 4))).shape == (0, 4)


def test_no_gradient_flows_through_a_matching():
    cost = jnp.asarray(costs(4))

    def picked(c):
        return jnp.sum(jnp.take_along_axis(c, match(c)[..., None], axis=2))

    # Each row passes its gradient to the one entry that was picked.
    np.testing.assert_array_equal(np.asarray(jax.grad(picked)(cost)).sum(2), 1)


LARGE = """
import jax, numpy as np, jax.numpy as jnp
from ovseg_jax import sharding
from ovseg_jax.losses.matching import match
from scipy.optimize import linear_sum_assignment

mesh = sharding.make_mesh()
cost = np.random.default_rng(0).normal(size=(8 * 512, 8, 8)).astype(np.float32)
assert cost.nbytes / 8 > 100 * 1024

def mean_cost(a):
    # The costs are computed in the program and a collective follows, as in a train step: that is
    # what the callbacks' threads would block.
    cost = jnp.einsum("nij,jk->nik", a, jnp.eye(8))
    found = match(cost, "host", mesh)
    return found, jnp.mean(jnp.take_along_axis(cost, found[..., None], axis=2))

split = sharding.batch_sharding(mesh)
run = jax.jit(mean_cost, in_shardings=split)
for _ in range(3):
    found, mean = run(jax.device_put(cost, split))
want = np.stack([linear_sum_assignment(c)[1] for c in cost])
assert (np.asarray(found) == want).all()
np.testing.assert_allclose(mean, np.take_along_axis(cost, want[..., None], 2).mean(), rtol=1e-4)
print("matched", jax.device_count())
"""


def test_costs_above_100_kib_per_device_do_not_hang():
    """In a process of its own, so that a hang is a failure."""
    done = subprocess.run(
        [sys.executable, "-c", LARGE],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.strip() == "matched 8", done.stderr[-2000:]
