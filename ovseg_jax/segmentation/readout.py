"""Eq. 1: from affinity, groups and class embeddings to a label for each pixel.

Pure functions of arrays, to be jitted by the caller. The steps, in order:

1. `class_scores`: cosines of every patch with every class, A G T^T with unit G and T;
2. `probabilities`: softmax over the classes of scale * cosine; `held_to_image` may then lower
   classes that the whole image speaks against;
3. `decide` and `spread`: upsample, then take the best class, or (the order of Eq. 1) the other way
   round.

Background is no class of the text encoder: a pixel is background where its best probability is
below a threshold, or where a word that stands for background wins it (see `vocabulary`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ovseg_jax.errors import UserError
from ovseg_jax.shapes import Array, Float, Int

AnyArray = Array | np.ndarray
# One for all images, or one for each.
Threshold = float | Float[AnyArray, ""] | Float[AnyArray, "B 1 1"]
ORDERS = ("upsample_first", "argmax_first")
# The default on TPU and recent GPUs rounds inputs of a matmul to about three digits, which moves
# labels near a tie.
EXACT = jax.lax.Precision.HIGHEST


def unit(x: Float[AnyArray, "... E"]) -> Float[Array, "... E"]:
    """`x` in f32 with unit norm along the last axis; a zero vector stays zero."""
    x = jnp.asarray(x).astype(jnp.float32)
    norm = jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))
    return x / jnp.maximum(norm, jnp.float32(1e-12))


def cosines(
    tokens: Float[AnyArray, "B K E"], text: Float[AnyArray, "C E"]
) -> Float[Array, "B K C"]:
    """Cosine of each token with each class."""
    return jnp.einsum("bke,ce->bkc", unit(tokens), unit(text), precision=EXACT)


def class_scores(
    affinity: Float[AnyArray, "B L K"],
    groups: Float[AnyArray, "B K E"],
    text: Float[AnyArray, "C E"],
    grid: tuple[int, int],
) -> Float[Array, "B h w C"]:
    """A G T^T of Eq. 1 on the patch grid, with every group and class at unit norm.

    A patch's score is the mean of its groups' cosines with the class, weighted by its affinity.

    Args:
      affinity: patch to group, rows sum to one over K.
      grid: (rows, columns), rows * columns = L.
    """
    cosine = cosines(groups, text)
    affinity = jnp.asarray(affinity).astype(jnp.float32)
    scores = jnp.einsum("blk,bkc->blc", affinity, cosine, precision=EXACT)
    return scores.reshape(scores.shape[0], *grid, scores.shape[-1])


def probabilities(
    scores: Float[AnyArray, "... C"], scale: float | Float[AnyArray, ""]
) -> Float[Array, "... C"]:
    """softmax over the classes of `scale` * `scores`."""
    return jax.nn.softmax(jnp.asarray(scores) * jnp.asarray(scale, jnp.float32), axis=-1)


def held_to_image(
    p: Float[AnyArray, "... C"],
    margins: Float[AnyArray, "... C"],
    scale: float | Float[AnyArray, ""],
    foreground: float | Float[AnyArray, "... words"] = 0.0,
) -> Float[Array, "... C"]:
    """`p` with the classes held down that the image as a whole speaks against.

    Groups say where something is, the image embedding says what there is: it is what the
    contrastive loss trains, and is surer of its classes than any one group.

    Args:
      margins: cosine of each class with the image embedding, less that of the image's best class.
      scale: a class is weighted by exp(scale * margin), the best one by 1.
      foreground: log-probability that a cell shows no surroundings, see `foreground_log`; for each
        class, or one for all.
    """
    held = jnp.asarray(margins) * jnp.asarray(scale, jnp.float32) + jnp.asarray(foreground)
    return jnp.asarray(p) * jnp.exp(held)


def foreground_log(keys: Float[AnyArray, "h w D"], scale: float) -> Float[Array, "h w"]:
    """Log-probability that each cell of an image shows its subject, not its surroundings.

    A photograph's border shows surroundings more often than subjects (the boundary prior of
    Wei et al., Geodesic Saliency Using Background Priors, ECCV 2012). So a cell whose feature
    resembles the mean feature of the border cells probably shows surroundings too:
    -scale * max(0, cosine with that mean).

    Args:
      keys: features of all cells of one image, as the image lies.
    """
    features = unit(keys)
    inside = jnp.zeros(features.shape[:2], jnp.float32).at[1:-1, 1:-1].set(1.0)
    weights = (1.0 - inside) / jnp.sum(1.0 - inside)
    border = jnp.einsum("hw,hwd->d", weights, features, precision=EXACT)
    likeness = jnp.einsum("hwd,d->hw", features, unit(border), precision=EXACT)
    return -scale * jax.nn.relu(likeness)


def spread(
    maps: Float[AnyArray, "B h w C"],
    rows: Float[AnyArray, "H h"],
    columns: Float[AnyArray, "W w"],
) -> Float[Array, "B H W C"]:
    """Cells to pixels with one matrix for each axis (see `windows.cell_weights`)."""
    b, h, _, c = maps.shape
    wide = jnp.einsum("Ww,bhwc->bhWc", columns, maps, precision=EXACT)
    # A matrix for each image, though they are equal: with one for all, XLA computes [H,B,W,C] and
    # transposes the large result, which takes as long as everything else.
    rows = jnp.broadcast_to(jnp.asarray(rows), (b, *rows.shape))
    tall = jnp.matmul(rows, wide.reshape(b, h, -1), precision=EXACT)
    return tall.reshape(b, rows.shape[1], columns.shape[0], c)


def decide(
    p: Float[AnyArray, "... C"],
    threshold: Threshold | None,
    owners: tuple[int, ...] | None = None,
) -> Int[Array, "..."]:
    """The label of each position.

    With a threshold: 0 (background) where the best probability is below it or where the best word
    stands for background, else 1 + the class of the best word. With None there is no background:
    the class of the best word, 0..C-1. The best word's class is also the class with the highest
    probability where a class has that of its best word.

    Args:
      p: probabilities of the words.
      owners: the class of each word, -1 for background; by default every word is a class.

    Raises:
      UserError: words for the background, and no threshold.
    """
    best = jnp.argmax(p, axis=-1).astype(jnp.int32)
    if owners is not None:
        best = jnp.asarray(_checked(owners, threshold), jnp.int32)[best]
    if threshold is None:
        return best
    return jnp.where(jnp.max(p, axis=-1) >= threshold, best + 1, 0)


def _checked(owners: tuple[int, ...], threshold: Any) -> tuple[int, ...]:
    if threshold is None and min(owners) < 0:
        raise UserError("words for the background need a background that they can be painted as")
    return owners


def votes(labels: Int[AnyArray, "..."], labels_count: int) -> Float[Array, "... N"]:
    """One vote for the label of each cell, so that labels of several windows can be averaged."""
    return jax.nn.one_hot(labels, labels_count, dtype=jnp.float32)


def before_spread(
    p: Float[AnyArray, "B h w C"],
    threshold: Threshold | None,
    order: str,
    owners: tuple[int, ...] | None = None,
) -> Float[Array, "B h w N"]:
    """What `spread` carries to the pixels: probabilities, or votes for labels decided by cell."""
    check_order(order)
    if order == "upsample_first":
        return jnp.asarray(p)
    count = p.shape[-1] if owners is None else max(owners) + 1
    return votes(decide(p, threshold, owners), count + (threshold is not None))


def after_spread(
    maps: Float[AnyArray, "B H W N"],
    threshold: Threshold | None,
    order: str,
    owners: tuple[int, ...] | None = None,
) -> Int[Array, "B H W"]:
    """Labels of the pixels from what `spread` gave; the counterpart of `before_spread`."""
    if order == "upsample_first":
        return decide(maps, threshold, owners)
    return jnp.argmax(maps, axis=-1).astype(jnp.int32)


def check_order(order: str) -> None:
    """Raises UserError for an order of upsampling and argmax that does not exist."""
    if order not in ORDERS:
        raise UserError(f"order {order!r} is not known; there are: {', '.join(ORDERS)}")
