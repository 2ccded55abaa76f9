"""Eq. 1: from affinity, groups and class embeddings to a label for each pixel.

Pure functions of arrays, to be jitted by the caller. The steps, in order:

1. `class_scores`: cosines of every patch with every class, A G T^T with unit G and T;
2. `probabilities`: softmax over the classes of scale * cosine; `downweight_by_image_score` may then
   lower classes that the whole image speaks against;
3. `spread` and `decide`: upsample, then take the best class, or (the order of Eq. 1) the other way
   round.

Background is no class of the text encoder: a pixel is background where its best probability is
below a threshold, or where a word that stands for background wins it (see `vocabulary`).
"""

import jax
import jax.numpy as jnp
import numpy as np

from ovseg_jax.shapes import Array, Float, Int

AnyArray = Array | np.ndarray
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


def downweight_by_image_score(
    p: Float[AnyArray, "... C"],
    margins: Float[AnyArray, "... C"],
    scale: float | Float[AnyArray, ""],
    foreground: float | Float[AnyArray, "... words"] = 0.0,
) -> Float[Array, "... C"]:
    """p * exp(scale * margin + foreground): lower for classes that the whole image speaks against.

    Groups say where something is, the image embedding says what there is. It is what the
    contrastive loss trains, so it is surer of its classes than any single group.

    Args:
      margins: cosine of each class with the image embedding, minus that of the image's best class.
      foreground: log-probability that a cell shows no surroundings, see `foreground_log`; for each
        class, or the same for all.
    """
    exponent = jnp.asarray(margins) * jnp.asarray(scale, jnp.float32) + jnp.asarray(foreground)
    return jnp.asarray(p) * jnp.exp(exponent)


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
    highest: Float[np.ndarray, "..."],
    best: Int[np.ndarray, "..."],
    threshold: float | np.float32 | Float[np.ndarray, "..."] | None,
    classes: Int[np.ndarray, " words"],
) -> Int[np.ndarray, "..."]:
    """The label of each position, from its best word and that word's probability.

    With a threshold: 0 (background) where the probability is lower or where the word stands for
    background, otherwise 1 + the class of the word. With None there is no background: the class.
    The best word's class is also the best class, if a class has the probability of its best word.

    Args:
      classes: the class of each word, -1 for background.
    """
    labels = (classes + (threshold is not None)).astype(np.int32)[best]
    if threshold is not None:
        labels[highest < threshold] = 0
    return labels
