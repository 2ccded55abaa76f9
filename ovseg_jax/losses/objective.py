"""Weighted means of the loss terms, their sum (Eq. 13), and the cross entropy of masked tokens."""

import jax
import jax.numpy as jnp

from ovseg_jax.shapes import Array, Float, Int


def weighted_mean(values: Float[Array, "B"], weight: Float[Array, "B"]) -> Float[Array, ""]:
    """Mean over the examples with weight, 0 if there are none; the others may hold anything."""
    present = weight > 0
    total = jnp.sum(jnp.where(present, values, 0.0) * weight)
    return total / jnp.maximum(jnp.sum(weight), 1e-6)


def divided_sum(
    values: Float[Array, "B"], weight: Float[Array, "B"], divisor: int | float
) -> Float[Array, ""]:
    """Sum over the examples with weight, over a given divisor.

    The released training divides one device's sum by K and averages over devices: on the global
    batch ``divisor = K * devices``.
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
    for weight, term in ((entity_weight, entity), (mask_weight, mask)):
        if term is not None:
            total = total + weight * term
    return total


def masked_token_loss(
    logits: Float[Array, "B M C"], targets: Int[Array, "B M"]
) -> Float[Array, "B"]:
    """Masked language modeling over the entity set (Table 4, rows "MLM"): cross entropy.

    `targets` is the class of each masked token, negative elsewhere. The mean over an example's
    masked tokens, float32; 0 where nothing is masked.
    """
    present = targets >= 0
    scores = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(scores, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    count = jnp.sum(present.astype(jnp.float32), axis=1)
    return -jnp.sum(jnp.where(present, chosen, 0.0), axis=1) / jnp.maximum(count, 1.0)
