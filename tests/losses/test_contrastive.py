"""Eq. 7 and 9 against plain NumPy, and what weights and excluded pairs do."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import losses as reference

from ovseg_jax.losses.contrastive import (
    candidate_pairs,
    false_negative_rate,
    info_nce,
    multi_label_info_nce,
)
from ovseg_jax.losses.objective import divided_sum, total_loss, weighted_mean

RELEASED = Path(__file__).parents[1] / "released"

B, E = 6, 4


def unit_rows(seed):
    x = np.random.default_rng(seed).normal(size=(B, E))
    return jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.float32)


def numpy64(*arrays):
    return [np.asarray(array, np.float64) for array in arrays]


def test_info_nce_over_all_pairs():
    a, b = unit_rows(0), unit_rows(1)
    everything = jnp.ones((B, B), bool)
    got = jax.jit(info_nce)(a, b, jnp.float32(14.0), everything)
    want = reference.info_nce(*numpy64(a, b), 14.0, np.ones((B, B), bool))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    # Both directions enter alike.
    np.testing.assert_allclose(info_nce(b, a, jnp.float32(14.0), everything), got, rtol=1e-5)


def test_info_nce_with_excluded_pairs():
    a, b = unit_rows(2), unit_rows(3)
    keep = np.random.default_rng(4).random((B, B)) < 0.5
    keep[2] = keep[:, 2] = False
    got = info_nce(a, b, jnp.float32(5.0), jnp.asarray(keep))
    np.testing.assert_allclose(
        got, reference.info_nce(*numpy64(a, b), 5.0, keep), rtol=1e-5, atol=1e-6
    )
    assert got[2] == 0.0  # alone with itself


def test_matched_pairs_at_a_high_temperature_cost_nothing_and_stay_finite():
    z = jnp.eye(B)
    loss, grad = jax.value_and_grad(
        lambda z: jnp.sum(info_nce(z, z, jnp.float32(100.0), jnp.ones((B, B), bool)))
    )(z)
    assert loss < 1e-6 and np.isfinite(grad).all()


def test_two_devices_of_the_released_training_are_one_global_batch():
    arrays = np.load(RELEASED / "contrastive_2rank.npz")
    a, b = (jnp.asarray(arrays[f"{name}_x"].reshape(6, -1)) for name in ("image", "text"))
    a, b = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    pairs = jnp.ones((6, 6), bool)
    for scale, name in ((jnp.exp(2.5), "ls2p5"), (100.0, "ls6_clamped")):
        each = info_nce(a, b, jnp.float32(scale), pairs)
        by_rank = each.reshape(2, 3).mean(1)
        np.testing.assert_allclose(by_rank, arrays[f"loss_per_rank_{name}"], rtol=1e-5)
    mean = jnp.mean(info_nce(a, b, jnp.exp(jnp.float32(2.5)), pairs))
    np.testing.assert_allclose(mean, arrays["loss_global_batch_ls2p5"], rtol=1e-5)


def test_several_texts_per_image():
    rng = np.random.default_rng(8)
    texts = rng.normal(size=(B, 3, E))
    texts = jnp.asarray(texts / np.linalg.norm(texts, axis=-1, keepdims=True), jnp.float32)
    a, keep, present = unit_rows(9), rng.random((B, B)) < 0.7, rng.random((B, 3)) < 0.7
    present[1] = False
    masks = jnp.asarray(keep), jnp.asarray(present)
    got, grad = jax.value_and_grad(
        lambda b: jnp.sum(multi_label_info_nce(a, b, jnp.float32(6.0), *masks))
    )(texts)
    want = reference.multi_label_info_nce(*numpy64(a, texts), 6.0, keep, present)
    assert want[1] == 0 and (want > 0).sum() == B - 1
    np.testing.assert_allclose(
        multi_label_info_nce(a, texts, jnp.float32(6.0), *masks), want, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(grad[~present], 0)
    assert np.isfinite(got) and np.isfinite(grad).all()
    one = multi_label_info_nce(a, texts[:, :1], jnp.float32(6.0), masks[0], jnp.ones((B, 1), bool))
    np.testing.assert_allclose(one, info_nce(a, texts[:, 0], jnp.float32(6.0), masks[0]), rtol=1e-6)


@pytest.mark.parametrize("name", ["dev", "dev2"])
def test_the_released_multi_label_loss(name):
    # Caption and completed answer are the two texts of each image.
    arrays = np.load(RELEASED / f"{name}_eval_rest.npz")
    image, *texts = (
        arrays[key] / np.linalg.norm(arrays[key], axis=1, keepdims=True)
        for key in ("out/image_x", "out/text_x", "entity/answer_text_x")
    )
    scale = jnp.asarray(arrays["out/logit_scale_exp_clamped"])
    every = jnp.ones((len(image),) * 2, bool)
    texts = jnp.asarray(np.stack(texts, 1))
    present = jnp.ones(texts.shape[:2], bool)
    values = multi_label_info_nce(jnp.asarray(image), texts, scale, every, present)
    np.testing.assert_allclose(jnp.mean(values), arrays["out/multi_label_loss"], rtol=1e-5)
    pairs = info_nce(jnp.asarray(image), texts[:, 0], scale, every)
    np.testing.assert_allclose(jnp.mean(pairs), arrays["out/matching_loss"], rtol=1e-5)


def test_candidate_pairs():
    weight = jnp.asarray([1.0, 0.0, 2.0, 1.0])
    sets = jnp.asarray([5, 5, 5, 7], jnp.int32)
    present = np.array([1, 0, 1, 1], bool)
    both = present[:, None] & present[None]
    np.testing.assert_array_equal(candidate_pairs(weight), both)
    differ = np.asarray(sets)[:, None] != np.asarray(sets)[None]
    np.testing.assert_array_equal(candidate_pairs(weight, sets), both & differ)
    # Of the six ordered pairs of three examples, two share their entities.
    np.testing.assert_allclose(false_negative_rate(weight, sets), 2 / 6)
    assert false_negative_rate(jnp.zeros(4), sets) == 0


def test_a_weightless_example_changes_nothing_whatever_it_holds():
    a, b, c = unit_rows(5), unit_rows(6), unit_rows(7)
    weight = jnp.asarray([1.0, 1.0, 0.0, 1.0, 0.5, 1.0])

    def loss(a, b):
        pairs = candidate_pairs(weight)
        return weighted_mean(info_nce(a, b, jnp.float32(9.0), pairs), weight)

    value, grad = jax.value_and_grad(loss)(a, b)
    swapped = loss(a.at[2].set(c[2]), b.at[2].set(c[3]))
    np.testing.assert_allclose(value, swapped, rtol=1e-6)
    np.testing.assert_array_equal(grad[2], 0)
    kept = np.flatnonzero(np.asarray(weight))
    each = reference.info_nce(*numpy64(a[kept], b[kept]), 9.0, np.ones((5, 5), bool))
    np.testing.assert_allclose(value, np.average(each, weights=weight[kept]), rtol=1e-5)


def test_weighted_mean():
    values, weight = jnp.asarray([1.0, np.nan, 4.0]), jnp.asarray([1.0, 0.0, 2.0])
    mean, grad = jax.value_and_grad(weighted_mean)(values, weight)
    np.testing.assert_allclose(mean, 3.0)
    np.testing.assert_allclose(grad, [1 / 3, 0, 2 / 3])
    assert weighted_mean(values, jnp.zeros(3)) == 0
    np.testing.assert_allclose(divided_sum(values, weight, 3), 3.0)


def test_equation_13():
    terms = [jnp.float32(x) for x in (2.0, 3.0, 5.0)]
    weights = {"entity_weight": 0.5, "mask_weight": 0.1}
    np.testing.assert_allclose(total_loss(*terms, **weights), 2 + 0.5 * 3 + 0.1 * 5, rtol=1e-6)
    assert total_loss(terms[0], None, None, **weights) == 2
    np.testing.assert_allclose(total_loss(terms[0], None, terms[2], **weights), 2.5, rtol=1e-6)
