"""Group consistency against plain NumPy, and what may not count in it."""

import jax
import jax.numpy as jnp
import numpy as np

from ovseg_jax.losses.contrastive import group_set_nce, negatives_mask

B, S, E = 5, 3, 8
RNG = np.random.default_rng(0)
SCALE = jnp.float32(7.0)


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


OWN, OTHER = (unit(RNG.normal(size=(B, S, E))) for _ in range(2))
PRESENT, LABEL = np.array([1, 1, 0, 1, 1], bool), np.array([0, 1, 2, 0, 3], np.int32)
NEGATIVES = negatives_mask(jnp.asarray(PRESENT, jnp.float32), jnp.asarray(LABEL))
KEEP = PRESENT[:, None] & PRESENT[None] & (LABEL[:, None] != LABEL[None])


def plain(own, other, keep):
    values = []
    for i in range(B):
        total = 0.0
        for s in range(S):
            mass = [np.exp(7.0 * (other[j] @ own[i, s])).sum() for j in range(B)]
            among = sum(mass[j] for j in range(B) if keep[i, j] or j == i)
            total -= np.log(mass[i] / among) / S
        values.append(total)
    return values


def test_equals_the_sum_written_out():
    found = group_set_nce(jnp.asarray(OWN), jnp.asarray(OTHER), SCALE, NEGATIVES)
    wanted = plain(OWN.astype(float), OTHER.astype(float), KEEP)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)  # 0 for a pair without rivals


def test_gradients_go_to_the_online_groups_alone():
    def total(own, other):
        return group_set_nce(own, other, SCALE, negatives_mask(jnp.ones(B))).sum()

    own, other = jax.grad(total, argnums=(0, 1))(jnp.asarray(OWN), jnp.asarray(OTHER))
    assert np.abs(own).min() > 0 and not np.abs(other).any()
