"""Slot-attention binding: each patch is claimed by a group (Sec. 3.1.1, Eq. 3-6)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from ovseg_jax.models.layers import Dense, contract, layer_norm
from ovseg_jax.shapes import Array, Float

# A group whose patches weigh less than this in total counts as empty.
EMPTY = 1e-6


@struct.dataclass
class Binding:
    """What binding gives.

    Attributes:
      groups: the bound groups (Eq. 6), [B, K, D].
      affinity: the soft map of Eq. 4, without noise, [B, L, K].
      assigned: the map that Eq. 5 averaged with: one-hot with the gradient of a noisy softmax where
        the assignment is hard, else `affinity` again.
      query, key: the two sides of Eq. 4's product, [B, K, D] and [B, L, D].
    """

    groups: Float[Array, "B K D"]
    affinity: Float[Array, "B L K"]
    assigned: Float[Array, "B L K"]
    query: Float[Array, "B K D"]
    key: Float[Array, "B L D"]


def straight_through(soft: Float[Array, "B L K"]) -> Float[Array, "B L K"]:
    """One-hot of the largest entry over the last axis forward, the gradient of `soft` backward.

    Ties go to the first index.
    """
    hard = jax.nn.one_hot(jnp.argmax(soft, axis=-1), soft.shape[-1], dtype=soft.dtype)
    return (hard - jax.lax.stop_gradient(soft)) + soft


def assigned_map(
    logits: Float[Array, "B L K"],
    assignment: str,
    noise: Float[Array, "B L K"] | None,
    temperature: float,
) -> Float[Array, "B L K"]:
    """The map that patches are averaged with, from the logits of Eq. 4.

    Args:
      assignment: "soft" (softmax over the groups) or "hard" (`straight_through` of it).
      noise: added to the logits of a hard assignment; None for none.
      temperature: of the noisy softmax.
    """
    if assignment == "soft":
        return jax.nn.softmax(logits, axis=-1)
    if noise is not None:
        logits = (logits + noise) / temperature
    return straight_through(jax.nn.softmax(logits, axis=-1))


def weighted_mean(
    assignment: Float[Array, "B L K"],
    values: Float[Array, "B L D"],
    matmul_dtype: Any,
    count_offset: float = 0.0,
) -> Float[Array, "B K D"]:
    """Eq. 5: mean of the patches' values, weighted by their assignment to each group.

    `count_offset` is added to the sum of weights that Eq. 5 divides by. Without it the mean of an
    empty group is 0 with a finite gradient. Dividing 0 by 0 would be NaN in the forward pass, and
    selecting after the division would leave NaN in the backward pass, so the denominator itself is
    replaced.
    """
    total = jnp.sum(assignment, axis=1) + count_offset
    occupied = total > EMPTY
    weighted = contract("blk,bld->bkd", assignment, values, matmul_dtype)
    safe = jnp.where(occupied, total, 1.0)
    return jnp.where(occupied[..., None], weighted / safe[..., None], 0.0)


class SlotBinding(nn.Module):
    """Binds patches to groups in one pass (no recurrence), Eq. 3-6.

    Inputs are normalized first, as in slot attention (Locatello et al., 2020) and in every other
    pre-norm layer of this encoder; the paper prints the linear maps only.

    Attributes:
      assignment: "hard" (one-hot forward, soft gradient; with Gumbel noise in training) or "soft".
      scale: factor on K.Q in Eq. 4; None for D ** -0.5. The paper prints none.
      gumbel_temperature: temperature of the noisy softmax whose argmax is taken.
    """

    assignment: str
    scale: float | None
    gumbel_temperature: float
    eps: float
    dtype: Any
    matmul_dtype: Any

    @nn.compact
    def __call__(
        self,
        groups: Float[Array, "B K D"],
        patches: Float[Array, "B L D"],
        train: bool,
        noise: Float[Array, "B L K"] | None = None,
    ) -> Binding:
        """Eq. 3-6. `noise` stands in for a draw of the "gumbel" stream, in training only."""
        width = groups.shape[-1]
        options = {"dtype": self.dtype, "matmul_dtype": self.matmul_dtype}
        normed_groups = layer_norm("group_norm", self.eps, self.dtype)(groups)
        normed_patches = layer_norm("patch_norm", self.eps, self.dtype)(patches)
        query = Dense(width, ("embed", "heads"), name="query", **options)(normed_groups)
        key = Dense(width, ("embed", "heads"), name="key", **options)(normed_patches)
        value = Dense(width, ("embed", "heads"), name="value", **options)(normed_patches)
        scale = width**-0.5 if self.scale is None else self.scale
        logits = contract("bld,bkd->blk", key * scale, query, self.matmul_dtype)
        affinity = jax.nn.softmax(logits, axis=-1)  # over groups: a patch is shared out among them
        if train and self.assignment == "hard" and noise is None:
            noise = jax.random.gumbel(self.make_rng("gumbel"), logits.shape, logits.dtype)
        assigned = assigned_map(
            logits, self.assignment, noise if train else None, self.gumbel_temperature
        )
        update = weighted_mean(assigned, value, self.matmul_dtype).astype(self.dtype)
        bound = groups + Dense(width, ("heads", "embed"), name="out", **options)(update)
        return Binding(bound, affinity, assigned, query, key)
