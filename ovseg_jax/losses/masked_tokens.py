"""Masked language modeling over the entity set (Table 4, rows "MLM")."""

import jax
import jax.numpy as jnp

from ovseg_jax.shapes import Array, Float, Int


def masked_token_loss(
    logits: Float[Array, "B M C"], targets: Int[Array, "B M"]
) -> Float[Array, "B"]:
    """Cross entropy of the masked tokens, the mean over those of an example.

    Args:
      targets: the class of each masked token, negative at all others.

    Returns:
      One value per example, float32; 0 where nothing is masked.
    """
    present = targets >= 0
    scores = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(scores, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    count = jnp.sum(present.astype(jnp.float32), axis=1)
    return -jnp.sum(jnp.where(present, chosen, 0.0), axis=1) / jnp.maximum(count, 1.0)
