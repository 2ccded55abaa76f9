"""Bipartite matching (Eq. 11): on the host with SciPy, or on the device.

The host backend is a `jax.pure_callback` inside `jax.shard_map` over the batch axes: each device
sends its own rows to its own host. Otherwise the partitioner would gather the batch on one device.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from ovseg_jax import platforms
from ovseg_jax.shapes import Array, Float, Int
from ovseg_jax.sharding import BATCH_AXES, AnyMesh

# On CPU, a callback argument of 100 KiB or more is copied by the same thread pool that waits for
# the callbacks of the other (fake) devices, and the program hangs. Stay well below.
CPU_CALLBACK_BYTES = 48 * 1024

# 5! = 120 permutations; 6! = 720 already cost more than the Hungarian algorithm.
ENUMERATE_LIMIT = 5

BACKENDS = ("host", "device", "enumerate")


def match(
    cost: Float[Array, "N k k"], backend: str = "host", mesh: AnyMesh | None = None
) -> Int[Array, "N k"]:
    """The permutation of least total cost for each of N square problems.

    Args:
      cost: of giving column j to row i. A problem with a non-finite entry is solved as if all its
        costs were 0, so that no host code sees it (the train step refuses a non-finite loss).
      backend: "host" (SciPy through a callback), "device" (Hungarian algorithm in XLA) or
        "enumerate" (all permutations, k <= `ENUMERATE_LIMIT`).
      mesh: where given, N is split over its batch axes and each device solves its own part.

    Returns:
      ``p`` with column ``p[n, i]`` given to row i. No gradient.
    """
    cost = jax.lax.stop_gradient(cost.astype(jnp.float32))
    finite = jnp.all(jnp.isfinite(cost), axis=(1, 2), keepdims=True)
    cost = jnp.where(finite, cost, 0.0)
    if backend == "enumerate":
        return _enumerate(cost)
    if backend == "device":
        return jax.vmap(_hungarian)(cost)
    if mesh is None or mesh.size == 1:
        return _on_host(cost)
    split = PartitionSpec(BATCH_AXES)
    solve = jax.shard_map(_on_host, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
    return solve(cost)


def _solve_with_scipy(cost: Array | np.ndarray) -> np.ndarray:
    # Runs on the host. It must return NumPy and never call JAX: that would hang. SciPy's solvers
    # are imported where they are used, since the import takes half a second.
    from scipy.optimize import linear_sum_assignment

    cost = np.asarray(cost)
    return np.stack([linear_sum_assignment(problem)[1] for problem in cost]).astype(np.int32)


def _on_host(cost: Array) -> Array:
    count, size = cost.shape[0], cost.shape[-1]
    if count == 0:
        return jnp.zeros((0, size), jnp.int32)
    limit = count
    if platforms.target() == "cpu":
        limit = max(1, CPU_CALLBACK_BYTES // (4 * size * size))
    parts = []
    for start in range(0, count, limit):
        part = cost[start : start + limit]
        shape = jax.ShapeDtypeStruct((part.shape[0], size), jnp.int32)
        parts.append(jax.pure_callback(_solve_with_scipy, shape, part, vmap_method="sequential"))
    return jnp.concatenate(parts)


def _enumerate(cost: Array) -> Array:
    size = cost.shape[-1]
    table = np.array(list(itertools.permutations(range(size))), np.int32)
    # total[n, p] = sum_i cost[n, i, table[p, i]]
    one_hot = jax.nn.one_hot(table, size, dtype=cost.dtype)
    total = jnp.einsum("nij,pij->np", cost, one_hot, precision=jax.lax.Precision.HIGHEST)
    return jnp.asarray(table)[jnp.argmin(total, axis=1)]


def _hungarian(problem: Array) -> Array:
    import optax

    # For square costs the *rows* come back permuted and the columns in order, so the columns alone
    # are the identity: sort by row.
    rows, columns = optax.assignment.hungarian_algorithm(problem)
    return columns[jnp.argsort(rows)].astype(jnp.int32)
