"""Weighted means, Eq. 13, and the loss of masked language modeling against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from ovseg_jax.losses.objective import divided_sum, masked_token_loss, total_loss, weighted_mean

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(4, 6, 5)).astype(np.float32) * 3
TARGETS = np.where(RNG.random((4, 6)) < 0.4, RNG.integers(0, 5, (4, 6)), -1).astype(np.int32)
TARGETS[2] = -1


def test_the_mean_over_masked_tokens():
    found = np.asarray(masked_token_loss(jnp.asarray(LOGITS), jnp.asarray(TARGETS)))
    scores = LOGITS.astype(np.float64)
    scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
    for row in range(4):
        places = np.flatnonzero(TARGETS[row] >= 0)
        values = [-scores[row, place, TARGETS[row, place]] for place in places]
        np.testing.assert_allclose(found[row], np.mean(values) if values else 0.0, rtol=1e-5)


def test_other_tokens_get_no_gradient():
    def total(logits):
        return masked_token_loss(logits, jnp.asarray(TARGETS)).sum()

    grad = np.asarray(jax.grad(total)(jnp.asarray(LOGITS)))
    assert (np.abs(grad).sum(-1) > 0).tolist() == (TARGETS >= 0).tolist()


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
