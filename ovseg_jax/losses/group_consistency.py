"""Cross-image group consistency: the alternative to mask consistency in the paper's Table 6.

The groups that stand for the shared entity in either image are pulled together as two sets, and
away from those of the other pairs in the batch. The paper gives no formula. Here a group's
positives are all groups of the partner's set, and the probability of a set is the sum of its
groups', so that a group needs to find its like in the set, not to equal all of it.
"""

import jax
import jax.numpy as jnp

from ovseg_jax.losses.contrastive import Candidates, log_sums
from ovseg_jax.shapes import Array, Float
from ovseg_jax.sharding import AnyMesh


def group_set_nce(
    own: Float[Array, "B S E"],
    other: Float[Array, "B S E"],
    scale: Float[Array, ""],
    among: Candidates,
    mesh: AnyMesh | None = None,
) -> Float[Array, "B"]:
    """InfoNCE between the groups of one image and the set of its partner, one value per pair.

    Args:
      own: unit-norm groups of the online model. other: those of the partner, by the teacher;
        nothing flows back into them.
      scale: inverse temperature.
      among: pairs whose groups are negatives of one another; a pair's own always count.
      mesh: see `contrastive.map_rows`.

    Returns:
      The mean over a pair's own groups of minus the log probability of the partner's set, float32.
    """
    other = jax.lax.stop_gradient(other)
    everything, _ = log_sums(own, other, scale, among, mesh)
    cosines = jnp.einsum("bse,bte->bst", own, other, precision="highest")
    return jnp.mean(everything - jax.nn.logsumexp(scale * cosines, axis=-1), axis=1)
