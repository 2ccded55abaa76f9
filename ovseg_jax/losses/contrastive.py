"""Symmetric InfoNCE over the global batch (Eq. 7 and 9), with one or several texts per image.

B is the global batch. Where it is split over devices, the compiler gathers the embeddings and
leaves the rows of the B x B logits where their examples are.
"""

import jax
import jax.numpy as jnp

from ovseg_jax.shapes import Array, Bool, Float, Int


def alike(labels: Int[Array, "B ..."]) -> Bool[Array, "B B"]:
    """Whether two examples have the same label.

    Of [B, N] names the first is in the example's sentence; it must be among the other's names.
    """
    everyone = _gathered(labels)
    if labels.ndim == 1:
        return labels[:, None] == everyone[None]
    # Neither is transposed: with a batch split over devices, that would move the whole square.
    first_of_row = jnp.any(labels[:, None, :1] == everyone[None], axis=-1)
    first_of_column = jnp.any(labels[:, None] == everyone[None, :, :1], axis=-1)
    return first_of_row | first_of_column


def _gathered(x: Array) -> Array:
    """`x` whole on every device, where a mesh is set: rows of pairs then stay where they are."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, jax.sharding.PartitionSpec())


def negatives_mask(
    weight: Float[Array, "B"], *labels: Int[Array, "B ..."] | None, within: Array | None = None
) -> Bool[Array, "B B"]:
    """Which examples are negatives of one another; never an example of itself.

    Args:
      weight: an example without weight is nobody's negative, and has none.
      labels: examples that are alike in any of them are no negatives, as the sentence of one is
        right for the other. None for a label that does not count.
      within: only examples that are equal in this are negatives: between different data sets,
        telling the set would be enough.
    """
    present = weight > 0
    negative = present[:, None] & _gathered(present)[None] & ~jnp.eye(len(weight), dtype=bool)
    for label in labels:
        if label is not None:
            negative &= ~alike(label)
    if within is not None:
        negative &= alike(within)
    return negative


def _cosines(a: Float[Array, "B T E"], b: Float[Array, "B U E"]) -> Float[Array, "B T B U"]:
    # In full precision: at a scale of 100, bfloat16 products would move logits by 0.3.
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum("ite,jue->itju", a, b, precision="highest")


def _log_sums(
    logits: Float[Array, "B T B U"],
    negatives: Bool[Array, "B B"],
    present: Bool[Array, "B U"] | None = None,
) -> Float[Array, "B T"]:
    """The logarithm of InfoNCE's denominator of each query [i, t] over all keys [j, u].

    The keys of the query's own example always count; where `present` is False, a key never does.
    """
    keep = (negatives | jnp.eye(len(negatives), dtype=bool))[:, None, :, None]
    if present is not None:
        keep &= present[None, None]
    logits = jnp.where(keep, logits, jnp.finfo(jnp.float32).min)
    return jax.nn.logsumexp(logits, axis=(2, 3))


def info_nce(
    a: Float[Array, "B E"],
    b: Float[Array, "B E"],
    scale: Float[Array, ""],
    negatives: Bool[Array, "B B"],
) -> tuple[Float[Array, "B"], Bool[Array, "B"]]:
    """Eq. 7 (or 9), one value per pair: the mean of both directions' cross entropy.

    The paper prints the softmax ratio without the ``-log``; the loss is ``-log``.

    Args:
      a, b: unit-norm embeddings; row i of one belongs to row i of the other.
      scale: inverse temperature.
      negatives: symmetric, see `negatives_mask`; the positive, the pair itself, always counts.

    Returns:
      ``-0.5 * (log p(b_i | a_i) + log p(a_i | b_i))``, float32, 0 without negatives; and whether
      b_i is nearer to a_i than any negative.
    """
    logits = scale * _cosines(a[:, None], b[:, None])[:, 0, :, 0]
    rows = _log_sums(logits[:, None, :, None], negatives)[:, 0]
    # Not the transposed logits, see `alike`.
    columns = _log_sums(scale * _cosines(b[:, None], a[:, None]), negatives)[:, 0]
    positive = scale * jnp.sum(a * b, axis=-1)
    rival = jnp.max(jnp.where(negatives, logits, jnp.finfo(jnp.float32).min), axis=1)
    return 0.5 * (rows + columns) - positive, positive > jax.lax.stop_gradient(rival)


def multi_label_info_nce(
    a: Float[Array, "B E"],
    b: Float[Array, "B T E"],
    scale: Float[Array, ""],
    negatives: Bool[Array, "B B"],
    present: Bool[Array, "B T"],
) -> Float[Array, "B"]:
    """InfoNCE where each image has several texts (GroupViT, Xu et al., 2022, Sec. 3.2).

    The mean over an image's texts of minus the log probability of each, among all texts of the
    batch, and of the image given the text, among all images. With one text it is `info_nce`.

    Texts that are not `present` are neither positives nor negatives. One value per image, float32;
    0 where it has no text.
    """
    logits = scale * _cosines(a[:, None], b)
    rows = _log_sums(logits, negatives, present)
    columns = _log_sums(scale * _cosines(b, a[:, None]), negatives)
    positive = scale * jnp.sum(a[:, None] * b, axis=-1)
    both = jnp.where(present, 0.5 * (rows + columns) - positive, 0.0)
    count = jnp.sum(present.astype(jnp.float32), axis=1)
    return jnp.sum(both, axis=1) / jnp.maximum(count, 1.0)


def group_set_nce(
    own: Float[Array, "B S E"], other: Float[Array, "B S E"], scale: Array, negatives: Array
) -> Float[Array, "B"]:
    """Cross-image group consistency: the alternative to mask consistency in the paper's Table 6.

    The groups of the shared entity in both images are pulled together as two sets, and away from
    those of other pairs. The paper gives no formula. Here the probability of the partner's set is
    the sum of its groups', so that a group must find its like in the set, not equal all of it.

    Args:
      own: unit-norm groups of the online model.
      other: those of the partner, by the teacher; nothing flows back into them.
      negatives: pairs whose groups are negatives of one another; a pair's own always count.

    Returns:
      The mean over a pair's own groups of minus the log probability of the partner's set, float32.
    """
    other = jax.lax.stop_gradient(other)
    everything = _log_sums(scale * _cosines(own, other), negatives)
    cosines = jnp.einsum("bse,bte->bst", own, other, precision="highest")
    return jnp.mean(everything - jax.nn.logsumexp(scale * cosines, axis=-1), axis=1)


def false_negative_rate(
    weight: Float[Array, "B"], label: Int[Array, "B ..."], within: Int[Array, "B"] | None = None
) -> Float[Array, ""]:
    """Share of the pairs, see `negatives_mask`, of different present examples that are alike."""
    pairs = negatives_mask(weight, within=within)
    equal = jnp.sum((pairs & alike(label)).astype(jnp.float32))
    return equal / jnp.maximum(jnp.sum(pairs.astype(jnp.float32)), 1.0)
