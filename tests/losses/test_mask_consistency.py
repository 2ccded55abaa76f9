"""Eq. 10-12 against plain NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import losses as reference

from ovseg_jax.errors import UserError
from ovseg_jax.losses import mask_consistency as losses
from ovseg_jax.losses.mask_consistency import Regions
from ovseg_jax.losses.released_mask_consistency import group_mask_loss

B, L, K, D, E = 4, 10, 6, 8, 5


def regions(seed):
    rng = np.random.default_rng(seed)
    joint = rng.normal(size=(B, K, E))
    joint /= np.linalg.norm(joint, axis=-1, keepdims=True)
    arrays = 2 * rng.normal(size=(B, L, D)), rng.normal(size=(B, K, D)), joint
    return Regions(*(jnp.asarray(array, jnp.float32) for array in arrays))


def case():
    """Online and teacher views of two images, and the shared entity's embedding."""
    entity = np.random.default_rng(9).normal(size=(B, E))
    entity = jnp.asarray(entity / np.linalg.norm(entity, axis=1, keepdims=True), jnp.float32)
    return (regions(0), regions(1)), (regions(2), regions(3)), entity


def numpy_of(pair, b):
    views = [(r.patches, r.groups, r.joint) for r in pair]
    return [tuple(np.asarray(x[b], np.float64) for x in arrays) for arrays in views]


@pytest.mark.parametrize(("ratio", "threshold"), [(0.5, 0.5), (1.0, 0.65), (0.2, 0.3)])
def test_equations_10_to_12(ratio, threshold):
    online, teacher, entity = case()
    run = jax.jit(losses.consistency_loss, static_argnames=("ratio", "threshold", "backend"))
    got, extra = run(online, teacher, entity, ratio=ratio, threshold=threshold, backend="host")
    for b in range(B):
        views = numpy_of(online, b), numpy_of(teacher, b)
        want = reference.consistency(*views, np.float64(entity[b]), ratio, threshold)
        np.testing.assert_allclose(got[b], want, rtol=1e-4)
    assert 0 < np.min(extra["target_fraction"]) and np.max(extra["target_fraction"]) < 1


OPTIONS = {"ratio": 0.5, "threshold": 0.5, "backend": "enumerate"}


def test_nothing_flows_into_the_teacher_the_entity_or_the_selection():
    online, teacher, entity = case()

    def total(online, teacher, entity):
        return jnp.sum(losses.consistency_loss(online, teacher, entity, **OPTIONS)[0])

    grad = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    to_online, to_teacher, to_entity = grad(online, teacher, entity)
    for leaf in [*jax.tree.leaves((to_teacher, to_entity)), *(r.joint for r in to_online)]:
        np.testing.assert_array_equal(leaf, 0)
    for image in to_online:
        assert np.abs(image.patches).max() > 1e-4 and np.abs(image.groups).max() > 1e-4


def test_subgroups_are_the_most_similar_ones():
    joint, entity = regions(4).joint, case()[2]
    got = losses.select_groups(joint, entity, 3)
    for b in range(B):
        assert list(got[b]) == reference.nearest_groups(np.asarray(joint[b]), entity[b], 3)
    assert losses.subgroup_count(8, 0.5) == 4
    assert losses.subgroup_count(30, 0.1) == 3
    for ratio in (0.05, 1.5):
        with pytest.raises(UserError, match="config.loss.group_ratio"):
            losses.subgroup_count(8, ratio)


def test_dice_of_empty_masks():
    target = jnp.asarray([[[1.0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]])
    prediction = jnp.asarray([[[0.5, 1, 0.25, 0], [0.5, 0, 0, 1], [0, 0, 0, 0]]])
    got = losses.dice(target, prediction)
    np.testing.assert_allclose(got, [[1 - 2 * 1.5 / 3.75, 1, 0]], rtol=1e-6)
    for k in range(3):
        want = reference.dice(np.asarray(target[0, k]), np.asarray(prediction[0, k]))
        np.testing.assert_allclose(got[0, k], want, rtol=1e-6)
    grad = jax.grad(lambda p: jnp.sum(losses.dice(target, p)))(prediction)
    assert np.isfinite(grad).all() and np.abs(grad[0, 0]).max() > 0
    np.testing.assert_array_equal(grad[0, 1:], 0)
    assert np.isfinite(losses.matching_cost(0 * target, 0 * prediction)).all()


@pytest.mark.parametrize("form", ["final tokens", "binding"])
def test_every_product_has_the_highest_precision(form):
    """Read from the program: on a CPU the results are the same with any precision."""
    online, teacher, entity = case()

    def total(online, teacher):
        if form == "final tokens":
            loss, _ = losses.consistency_loss(online, teacher, entity, ratio=0.5, threshold=0.5)
            return jnp.sum(loss)
        scores = jnp.ones((B, K), jnp.float32)
        options = {"grid": (2, 5), "size": (4, 10), "detached_ratio": 0.5, "threshold": 0.5}
        maps = online[0].groups, teacher[1].groups, teacher[1].patches, scores
        return jnp.sum(group_mask_loss(*maps, **options)[0])

    program = str(jax.make_jaxpr(jax.grad(total))(online, teacher))
    products = re.findall(r"dot_general\[.*?\n *\]", program, re.DOTALL)
    assert len(products) == program.count("dot_general[") >= 4
    assert all("HIGHEST" in product for product in products)
