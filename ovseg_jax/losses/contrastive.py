"""Symmetric InfoNCE over the global batch (Eq. 7 and 9), with one or several texts per image."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from ovseg_jax.shapes import Array, Bool, Float, Int
from ovseg_jax.sharding import BATCH_AXES, AnyMesh


@struct.dataclass
class Candidates:
    """Which examples may serve as negatives of one another.

    Attributes:
      present: False takes an example out: it is no one's negative, and has none.
      labels: examples that are alike in any of them (`_alike`) are not negatives of one another
        either: the sentence of one is a correct answer for the other.
    """

    present: Bool[Array, "B"]
    labels: tuple[Int[Array, "B ..."], ...] = ()


def candidates(weight: Float[Array, "B"], *labels: Int[Array, "B ..."] | None) -> Candidates:
    """The candidates of a batch: examples with weight; what is alike in a label is no negative.

    Args:
      labels: those that count; None for one that does not.
    """
    return Candidates(weight > 0, tuple(label for label in labels if label is not None))


def _alike(row: Int[Array, "..."], labels: Int[Array, "B ..."]) -> Bool[Array, "B"]:
    """Which labels equal that of a row; of several names, whether either's first is in the other.

    Symmetric, as the first is the name in the sentence of its example.
    """
    if labels.ndim == 1:
        return labels == row
    return jnp.any(labels == row[0], axis=1) | jnp.any(labels[:, :1] == row[None], axis=1)


@struct.dataclass
class _Points:
    # Embeddings, one or several of each example, whose number is `owner`. `there` is False at those
    # that only fill up.
    vectors: Float[Array, "*points E"]
    owner: Int[Array, "*points"]
    present: Bool[Array, "*points"]
    labels: tuple[Int[Array, "..."], ...]
    there: Bool[Array, "*points"]


def _points(
    vectors: Float[Array, "B T E"], among: Candidates, there: Bool[Array, "B T"] | None = None
) -> _Points:
    count, each = vectors.shape[:2]

    def repeated(x: Array) -> Array:
        return jnp.repeat(x, each, axis=0, total_repeat_length=count * each)

    return _Points(
        vectors.reshape(count * each, -1).astype(jnp.float32),
        repeated(jnp.arange(count)),
        repeated(among.present),
        tuple(map(repeated, among.labels)),
        jnp.ones(count * each, bool) if there is None else there.reshape(-1),
    )


def map_rows(
    one: Callable[[Any, Any, Any], Any],
    rows: Any,
    columns: Any,
    mesh: AnyMesh | None,
    shared: Any = (),
) -> Any:
    """`one(row, columns, shared)` for every row.

    Args:
      one: maps a row (the leaves of `rows` without their first axis) and all columns to arrays.
      rows, columns: trees of arrays whose first axis is that of the examples.
      mesh: rows stay on their devices, and columns (which are embeddings) are gathered on each, so
        that no device holds the square of logits. None computes everything in one place.
      shared: a tree of arrays that every row needs whole.

    Returns:
      What `one` gives, with the rows as first axis.
    """
    every_row = jax.vmap(one, in_axes=(0, None, None))
    if mesh is None or mesh.size == 1:
        return every_row(rows, columns, shared)

    def on_device(rows: Any, columns: Any, shared: Any) -> Any:
        whole = jax.tree.map(lambda x: jax.lax.all_gather(x, BATCH_AXES, tiled=True), columns)
        return every_row(rows, whole, shared)

    by_row = PartitionSpec(BATCH_AXES)
    return jax.shard_map(
        on_device, mesh=mesh, in_specs=(by_row, by_row, PartitionSpec()), out_specs=by_row
    )(rows, columns, shared)


def log_sums(
    queries: Float[Array, "B T E"],
    keys: Float[Array, "B U E"],
    scale: Float[Array, ""],
    among: Candidates,
    mesh: AnyMesh | None = None,
    keys_there: Bool[Array, "B U"] | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """For each query, the logarithm of InfoNCE's denominator; and its greatest negative logit.

    The keys of the query's own example always count; those of others where both examples are
    candidates.

    Args:
      queries, keys: unit-norm embeddings, several of each example.
      scale: inverse temperature.
      mesh: see `map_rows`.
      keys_there: False takes a key out for every query.
    """

    def one(query: _Points, keys: _Points, scale: Array) -> tuple[Array, Array]:
        # In full precision: at a scale of 100, bfloat16 products would move logits by 0.3.
        cosine = jnp.einsum("e,je->j", query.vectors, keys.vectors, precision="highest")
        negative = query.present & keys.present & (query.owner != keys.owner)
        for own, labels in zip(query.labels, keys.labels, strict=True):
            negative &= ~_alike(own, labels)
        negative &= keys.there
        logits, lowest = scale * cosine, jnp.finfo(jnp.float32).min
        keep = negative | ((query.owner == keys.owner) & keys.there)
        rival = jnp.max(jnp.where(negative, jax.lax.stop_gradient(logits), lowest))
        return jax.nn.logsumexp(jnp.where(keep, logits, lowest)), rival

    found = map_rows(
        one, _points(queries, among), _points(keys, among, keys_there), mesh, shared=scale
    )
    return jax.tree.map(lambda x: x.reshape(queries.shape[:2]), found)


def info_nce(
    a: Float[Array, "B E"],
    b: Float[Array, "B E"],
    scale: Float[Array, ""],
    among: Candidates,
    mesh: AnyMesh | None = None,
) -> tuple[Float[Array, "B"], Bool[Array, "B"]]:
    """Eq. 7 (or 9), one value per pair: the mean of both directions' cross entropy.

    The paper prints the softmax ratio without the ``-log``; the loss is ``-log``. Its positive is
    the pair itself.

    Args:
      a, b: unit-norm embeddings; row i of one belongs to row i of the other.
      scale: inverse temperature.
      among: the negatives; the positive always counts.
      mesh: see `map_rows`.

    Returns:
      ``-0.5 * (log p(b_i | a_i) + log p(a_i | b_i))``, float32, where rows without any candidate
      but themselves give 0; and whether b_i is nearer to a_i than any negative is.
    """
    rows, rivals = log_sums(a[:, None], b[:, None], scale, among, mesh)
    columns, _ = log_sums(b[:, None], a[:, None], scale, among, mesh)
    positive = scale * jnp.sum(a * b, axis=-1)
    return 0.5 * (rows[:, 0] + columns[:, 0]) - positive, positive > rivals[:, 0]


def multi_label_info_nce(
    a: Float[Array, "B E"],
    b: Float[Array, "B T E"],
    scale: Float[Array, ""],
    among: Candidates,
    present: Bool[Array, "B T"],
    mesh: AnyMesh | None = None,
) -> Float[Array, "B"]:
    """InfoNCE where each image has several texts (GroupViT, Xu et al., 2022, Sec. 3.2).

    As computed by GroupViT's training: the mean over an image's texts of minus the log
    probability of each, among all texts of the batch; and the mean over its texts of minus the log
    probability of the image given the text, among all images. With one text per image it is
    `info_nce`.

    Args:
      a, b: unit-norm embeddings of images and of their texts.
      scale: inverse temperature.
      among: as in `info_nce`, between examples.
      present: texts that are there; the others are neither positives nor negatives.
      mesh: see `map_rows`.

    Returns:
      One value per image, float32; 0 where it has no text.
    """
    rows, _ = log_sums(a[:, None], b, scale, among, mesh, keys_there=present)
    columns, _ = log_sums(b, a[:, None], scale, among, mesh)
    positive = scale * jnp.sum(a[:, None] * b, axis=-1)
    both = jnp.where(present, 0.5 * (rows + columns) - positive, 0.0)
    count = jnp.sum(present.astype(jnp.float32), axis=1)
    return jnp.sum(both, axis=1) / jnp.maximum(count, 1.0)


def false_negative_rate(
    weight: Float[Array, "B"], label: Int[Array, "B ..."], mesh: AnyMesh | None = None
) -> Float[Array, ""]:
    """Share of negatives that are alike in a label (among present examples)."""
    present = weight > 0

    def one(row: tuple, columns: tuple, shared: tuple) -> Array:
        del shared
        return jnp.sum((columns[0] & _alike(row[1], columns[1])).astype(jnp.float32))

    like = map_rows(one, (present, label), (present, label), mesh)
    count = jnp.sum(present.astype(jnp.float32))
    equal = jnp.sum(jnp.where(present, like - 1.0, 0.0))
    return equal / jnp.maximum(count * (count - 1.0), 1.0)
