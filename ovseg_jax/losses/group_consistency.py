"""Cross-image group consistency: the alternative to mask consistency in the paper's Table 6.

The groups that stand for the shared entity in either image are pulled together as two sets, and
away from those of the other pairs in the batch. The paper gives no formula. Here a group's
positives are all groups of the partner's set, and the probability of a set is the sum of its
groups', so that a group needs to find its like in the set, not to equal all of it.
"""

import jax
import jax.numpy as jnp

from ovseg_jax.shapes import Array, Bool, Float


def group_set_nce(
    own: Float[Array, "B S E"],
    other: Float[Array, "B S E"],
    scale: Float[Array, ""],
    candidates: Bool[Array, "B B"],
) -> Float[Array, "B"]:
    """InfoNCE between the groups of one image and the set of its partner, one value per pair.

    Args:
      own: unit-norm groups of the online model. other: those of the partner, by the teacher;
        nothing flows back into them.
      scale: inverse temperature.
      candidates: ``[i, j]`` False keeps the groups of pair j out of the denominators of pair i; the
        diagonal always counts.

    Returns:
      The mean over a pair's own groups of minus the log probability of the partner's set, float32.
    """
    other = jax.lax.stop_gradient(other)
    logits = scale * jnp.einsum("ise,jte->isjt", own, other)
    keep = candidates | jnp.eye(own.shape[0], dtype=bool)
    logits = jnp.where(keep[:, None, :, None], logits, jnp.finfo(jnp.float32).min)
    sets = jax.nn.logsumexp(logits, axis=-1)
    positive = jnp.einsum("isi->is", sets)
    return jnp.mean(jax.nn.logsumexp(sets, axis=-1) - positive, axis=1)
