"""Eq. 7 and 9 against plain NumPy, and what weights and excluded pairs do."""

import jax
import jax.numpy as jnp
import numpy as np
from reference import losses as reference

from ovseg_jax.losses.contrastive import candidate_pairs, false_negative_rate, info_nce
from ovseg_jax.losses.objective import total_loss, weighted_mean

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


def test_equation_13():
    terms = [jnp.float32(x) for x in (2.0, 3.0, 5.0)]
    weights = {"entity_weight": 0.5, "mask_weight": 0.1}
    np.testing.assert_allclose(total_loss(*terms, **weights), 2 + 0.5 * 3 + 0.1 * 5, rtol=1e-6)
    assert total_loss(terms[0], None, None, **weights) == 2
    np.testing.assert_allclose(total_loss(terms[0], None, terms[2], **weights), 2.5, rtol=1e-6)
