"""Symmetric InfoNCE over the global batch (Eq. 7 and 9), with one or several texts per image."""

import jax
import jax.numpy as jnp

from ovseg_jax.shapes import Array, Bool, Float, Int


def info_nce(
    a: Float[Array, "B E"],
    b: Float[Array, "B E"],
    scale: Float[Array, ""],
    candidates: Bool[Array, "B B"],
) -> Float[Array, "B"]:
    """Eq. 7 (or 9), one value per pair: the mean of both directions' cross entropy.

    The paper prints the softmax ratio without the ``-log``; the loss is ``-log``. Its positive is
    the diagonal.

    Args:
      a, b: unit-norm embeddings; row i of one belongs to row i of the other.
      scale: inverse temperature.
      candidates: ``[i, j]`` False takes pair (i, j) out of the denominators of row i and of
        column j. The diagonal always counts.

    Returns:
      ``-0.5 * (log p(b_i | a_i) + log p(a_i | b_i))``, float32. Rows without any candidate but
      themselves give 0.
    """
    logits = scale * jnp.einsum("ie,je->ij", a, b)
    keep = candidates | jnp.eye(a.shape[0], dtype=bool)
    logits = jnp.where(keep, logits, jnp.finfo(jnp.float32).min)
    positive = jnp.diagonal(logits)
    rows = jax.nn.logsumexp(logits, axis=1) - positive
    columns = jax.nn.logsumexp(logits, axis=0) - positive
    return 0.5 * (rows + columns)


def multi_label_info_nce(
    a: Float[Array, "B E"],
    b: Float[Array, "B T E"],
    scale: Float[Array, ""],
    candidates: Bool[Array, "B B"],
    present: Bool[Array, "B T"],
) -> Float[Array, "B"]:
    """InfoNCE where each image has several texts (GroupViT, Xu et al., 2022, Sec. 3.2).

    As computed by GroupViT's training: the mean over an image's texts of minus the log
    probability of each, among all texts of the batch; and the mean over its texts of minus the log
    probability of the image given the text, among all images. With one text per image it is
    `info_nce`.

    Args:
      a, b: unit-norm embeddings of images and of their texts.
      scale: inverse temperature.
      candidates: as in `info_nce`, between examples.
      present: texts that are there; the others are neither positives nor negatives.

    Returns:
      One value per image, float32; 0 where it has no text.
    """
    logits = scale * jnp.einsum("ie,jte->ijt", a, b)
    keep = (candidates | jnp.eye(a.shape[0], dtype=bool))[..., None] & present[None]
    logits = jnp.where(keep, logits, jnp.finfo(jnp.float32).min)
    positive = jnp.einsum("iit->it", logits)
    rows = jax.nn.logsumexp(logits, axis=(1, 2))[:, None] - positive
    columns = jax.nn.logsumexp(logits, axis=0) - positive
    both = jnp.where(present, 0.5 * (rows + columns), 0.0)
    count = jnp.sum(present.astype(jnp.float32), axis=1)
    return jnp.sum(both, axis=1) / jnp.maximum(count, 1.0)


def candidate_pairs(
    weight: Float[Array, "B"], entity_set: Int[Array, "B"] | None = None
) -> Bool[Array, "B B"]:
    """Which pairs may serve as negatives of one another.

    Args:
      weight: examples of weight 0 are no one's negative, and have none.
      entity_set: where given, examples with equal entity sets are not negatives of one another:
        the sentence of one is a correct answer for the other.
    """
    present = weight > 0
    keep = present[:, None] & present[None, :]
    if entity_set is not None:
        keep &= entity_set[:, None] != entity_set[None, :]
    return keep


def false_negative_rate(weight: Float[Array, "B"], entity_set: Int[Array, "B"]) -> Float[Array, ""]:
    """Share of negatives whose entity set equals the positive's (among present examples)."""
    others = candidate_pairs(weight) & ~jnp.eye(weight.shape[0], dtype=bool)
    equal = others & (entity_set[:, None] == entity_set[None, :])
    count = jnp.sum(others.astype(jnp.float32))
    return jnp.sum(equal.astype(jnp.float32)) / jnp.maximum(count, 1.0)
