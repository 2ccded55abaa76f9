"""The mask loss on the binding's own maps: the released code's values, and plain NumPy."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import losses as reference

from ovseg_jax import sharding
from ovseg_jax.losses import released_mask_consistency as losses
from ovseg_jax.losses.mask_consistency import mask_logits
from ovseg_jax.losses.matching import match
from ovseg_jax.losses.objective import divided_sum

RELEASED = Path(__file__).parents[1] / "released"
# Set, then what it was run with: cost, share of detached groups, threshold.
SETS = [("dev", "euclidean", 0.5, 0.6), ("dev2", "cosine", 0.75, 0.65)]
GRID, SIZE = (14, 14), (224, 224)
# Direction, the online pass of one image, the momentum pass of the other.
DIRECTIONS = [
    ("main", "img_online_image", "img_momentum_cross"),
    ("dual", "img_online_cross", "img_momentum_image"),
]


def relative(ours, theirs):
    theirs = np.asarray(theirs, np.float64)
    return np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs)


@pytest.fixture(scope="module", params=SETS, ids=[row[0] for row in SETS])
def released(request):
    name, *options = request.param
    return np.load(RELEASED / f"{name}_train_dual_on.npz"), *options


def inputs(arrays, online, teacher):
    return [
        jnp.asarray(arrays[key].reshape(arrays[key].shape[0], -1, arrays[key].shape[-1]))
        for key in (f"{online}/q", f"{teacher}/q", f"{teacher}/k")
    ]


def similarities(arrays, online, text="txt_cross_entity"):
    """Dot products of the first image's groups, not normalized, with the entity sentence."""
    return jnp.einsum(
        "bke,be->bk", jnp.asarray(arrays[f"{online}/image_feat"]), arrays[f"{text}/text_x"]
    )


@pytest.mark.parametrize(("direction", "online", "teacher"), DIRECTIONS)
def test_every_stage_of_the_released_loss(released, direction, online, teacher):
    # Values within 1e-5 of the norm, indices equal, at most one bit in a thousand at the threshold.
    arrays, cost, ratio, threshold = released
    stage = {
        key.partition("/")[2]: value
        for key, value in arrays.items()
        if key.startswith(f"mask_{direction}/")
    }
    q1, q2, k2 = inputs(arrays, online, teacher)
    prediction, target = mask_logits(k2, q1), mask_logits(k2, q2)
    assert relative(prediction, stage["pred_logits_14x14"]) < 1e-5
    assert relative(target, stage["target_logits_14x14"]) < 1e-5
    scores = similarities(arrays, online)
    assert relative(scores, stage["group_entity_logits"]) < 1e-5
    found = losses.lowest(scores, int(scores.shape[1] * ratio))
    detached = np.nonzero(np.asarray(found))[1].reshape(len(found), -1)
    np.testing.assert_array_equal(detached, np.sort(stage["detached_group_indices"], axis=1))
    costs = losses.pair_costs(prediction, target, GRID, SIZE, cost)
    assert relative(costs, stage["cost"]) < 1e-5
    permutation = match(costs)
    np.testing.assert_array_equal(permutation, stage["cols"])
    target = jnp.take_along_axis(target, permutation[..., None], axis=1)
    binary = losses.relative_binary(losses.enlarge(target, GRID, SIZE), threshold)
    bits = np.unpackbits(stage["target_bits"], axis=-1)
    assert (np.asarray(binary) != bits).mean() <= 1e-3
    soft = losses.stretched(losses.enlarge(prediction, GRID, SIZE))
    sample = soft.reshape(*soft.shape[:2], *SIZE)[:, :, ::16, ::16]
    assert relative(sample, stage["pred_minmax_subsampled"]) < 1e-5
    for ours, name in ((binary, "target"), (soft, "pred"), (binary * soft, "inter")):
        assert relative(ours.sum(-1), stage[f"{name}_sum"]) < 1e-5


def test_the_released_value_of_each_direction_and_of_both_as_rows_of_one_call(released):
    arrays, cost, ratio, threshold = released
    options = {"grid": GRID, "size": SIZE, "threshold": threshold, "cost": cost}

    def loss(*maps):
        values, _ = losses.group_mask_loss(*maps, detached_ratio=ratio, **options)
        return divided_sum(values, jnp.ones(len(values)), maps[0].shape[1])

    parts = []
    for direction, online, teacher in DIRECTIONS:
        parts.append((*inputs(arrays, online, teacher), similarities(arrays, online)))
        np.testing.assert_allclose(loss(*parts[-1]), arrays[f"mask_{direction}/dice"], rtol=1e-5)
    both = loss(*(jnp.concatenate(pair) for pair in zip(*parts, strict=True)))
    np.testing.assert_allclose(both / 2, arrays["loss/mask"], rtol=1e-5)


# ---- against plain NumPy, on shapes of another kind

B, K, D, ROWS, COLUMNS = 3, 4, 6, 3, 5


def case(seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((B, K, D), (B, K, D), (B, ROWS * COLUMNS, D), (B, K))
    return [jnp.asarray(1.5 * rng.normal(size=shape), jnp.float32) for shape in shapes]


def ours(q1, q2, k2, scores, **changed):
    options = {"grid": (ROWS, COLUMNS), "size": (7, 16), "detached_ratio": 0.5, "threshold": 0.7}
    return losses.group_mask_loss(q1, q2, k2, scores, **{**options, **changed})


@pytest.mark.parametrize("cost", losses.COSTS)
@pytest.mark.parametrize("size", [(7, 16), (3, 5), (1, 9)])
def test_plain_numpy(cost, size):
    arrays = case()
    values, extra = ours(*arrays, cost=cost, size=size)
    for b in range(B):
        q1, q2, k2 = (np.asarray(x[b], np.float64) for x in arrays[:3])
        value, fraction = reference.group_masks(q1, q2, k2, (ROWS, COLUMNS), size, 0.7, cost)
        np.testing.assert_allclose(values[b], value, rtol=2e-5)
        np.testing.assert_allclose(extra["target_fraction"][b], fraction, rtol=1e-5)


def test_gradient_reaches_the_queries_that_are_like_the_entity_alone():
    q1, q2, k2, scores = case(1)
    grads = jax.grad(lambda *a: jnp.sum(ours(*a)[0]), argnums=(0, 1, 2, 3))(q1, q2, k2, scores)
    for other in grads[1:]:
        np.testing.assert_array_equal(other, 0)
    reached = np.abs(grads[0]).max(-1) > 0
    np.testing.assert_array_equal(reached, np.argsort(np.argsort(scores, 1), 1) >= K // 2)
    for b, k in ((0, int(np.argmax(scores[0]))), (2, int(np.argmax(scores[2])))):
        step = np.zeros_like(q1)
        step[b, k, 3] = 1e-2
        change = ours(q1 + step, q2, k2, scores)[0] - ours(q1 - step, q2, k2, scores)[0]
        np.testing.assert_allclose(change[b] / 2e-2, grads[0][b, k, 3], rtol=0.02, atol=1e-4)
    all_reached = jax.grad(lambda q: jnp.sum(ours(q, q2, k2, scores, detached_ratio=0.1)[0]))(q1)
    assert (np.abs(all_reached).max(-1) > 0).all()


def test_constant_maps_are_finite():
    q1, q2, k2, scores = case(4)
    same = jnp.ones_like(k2)  # every patch looks alike: all maps are constant
    value, grad = jax.value_and_grad(lambda q: jnp.sum(ours(q, q2, same, scores)[0]))(q1)
    assert np.isfinite(value) and np.isfinite(grad).all()


def test_eight_devices_give_what_one_gives():
    rows = [jnp.concatenate([case(seed)[i] for seed in range(8)]) for i in range(4)]
    mesh = sharding.make_mesh()
    split = sharding.batch_sharding(mesh)

    def run(rows, mesh):
        total = jax.value_and_grad(lambda *rows: jnp.mean(ours(*rows, mesh=mesh)[0]))
        return jax.jit(total)(*rows)

    one, many = run(rows, None), run([jax.device_put(x, split) for x in rows], mesh)
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
