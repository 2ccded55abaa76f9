"""Weighted means of the loss terms and their sum (Eq. 13)."""

import jax.numpy as jnp

from ovseg_jax.shapes import Array, Float


def weighted_mean(values: Float[Array, "B"], weight: Float[Array, "B"]) -> Float[Array, ""]:
    """Mean over the examples with weight; 0 where none has any.

    Values of weightless examples do not enter, whatever they are, in value or gradient.
    """
    present = weight > 0
    total = jnp.sum(jnp.where(present, values, 0.0) * weight)
    return total / jnp.maximum(jnp.sum(weight), 1e-6)


def divided_sum(
    values: Float[Array, "B"], weight: Float[Array, "B"], divisor: int | float
) -> Float[Array, ""]:
    """Sum over the examples with weight, over a given divisor: grows with the batch.

    The released training divides the sum over one device's batch by K and averages over devices;
    on the global batch that is this sum with ``divisor = K * devices``.
    """
    return jnp.sum(jnp.where(weight > 0, values, 0.0) * weight) / divisor


def total_loss(
    contrastive: Float[Array, ""],
    entity: Float[Array, ""] | None,
    mask: Float[Array, ""] | None,
    *,
    entity_weight: float,
    mask_weight: float,
) -> Float[Array, ""]:
    """Eq. 13: L = L_contrast + w L_entity + lambda L_mask; a missing term counts 0.

    The paper's w is 1, its lambda 0 for 30 epochs and 0.1 afterwards.
    """
    total = contrastive
    if entity is not None:
        total = total + entity_weight * entity
    if mask is not None:
        total = total + mask_weight * mask
    return total
