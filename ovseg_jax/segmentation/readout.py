"""From affinities, groups and class embeddings to scores, probabilities and labels.

Pure functions of arrays, to be jitted by the caller. `labels` calls them for whole images.

*Soft patches* (Eq. 1): `class_scores` gives the cosine of every patch with every class,
A G T^T with unit G and T; `probabilities` is softmax(scale * cosine) over the classes;
`downweight_by_image_score` lowers classes that the whole image speaks against; `spread` takes cells
to pixels, and `decide` takes the best class.

*One group* (GroupViT's rule, and that of the released model): the affinity is upsampled to the
pixels of a window and each pixel goes to its best group. All pixels of a group share the
probabilities of its classes. The mean over windows is resized to the original image.

Background is no class of the text encoder: a pixel is background where its best probability is
below a threshold, or where a word that stands for background wins it (see `vocabulary`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ovseg_jax.segmentation.windows import bilinear_taps, bilinear_weights
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

    Groups say where something is, the image embedding says what there is. The contrastive loss
    trains the latter, so it is surer of its classes than any single group.

    Args:
      margins: cosine of each class with the image embedding, minus that of the image's best class.
      foreground: log-probability that a cell shows no surroundings, see `foreground_log`.
    """
    exponent = jnp.asarray(margins) * jnp.asarray(scale, jnp.float32) + jnp.asarray(foreground)
    return jnp.asarray(p) * jnp.exp(exponent)


def foreground_log(keys: Float[AnyArray, "h w D"], scale: float) -> Float[Array, "h w"]:
    """-scale * max(0, cosine of each cell's feature with the mean feature of the border cells).

    It is the log-probability that a cell shows the subject of an image, not its surroundings: a
    photograph's border shows surroundings more often than subjects (the boundary prior of Wei et
    al., Geodesic Saliency Using Background Priors, ECCV 2012).

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

    Args:
      classes: the class of each word, -1 for background.
    """
    labels = (classes + (threshold is not None)).astype(np.int32)[best]
    if threshold is not None:
        labels[highest < threshold] = 0
    return labels


# ---- one group for each pixel


def group_probabilities(
    groups: Float[AnyArray, "B K C"],
    image: Float[AnyArray, "B C"],
    scale: float | Float[AnyArray, ""],
    image_classes: int,
) -> Float[Array, "B K C"]:
    """The probability of each class for each group of a window.

    Args:
      groups, image: cosines of the groups and of the whole window with the classes.
      image_classes: multiply with a second softmax over this many classes, the most like the whole
        window; 0 for none.
    """
    logits = jnp.asarray(groups) * jnp.asarray(scale, jnp.float32)
    first = jax.nn.softmax(logits, axis=-1)
    if image_classes == 0:
        return first
    classes = logits.shape[-1]
    best = jax.lax.top_k(jnp.asarray(image), min(image_classes, classes))[1]
    kept = jnp.any(best[..., None] == jnp.arange(classes)[None, None], axis=1)
    return first * jax.nn.softmax(jnp.where(kept[:, None], logits, -jnp.inf), axis=-1)


def with_background(
    p: Float[AnyArray, "B K C"], threshold: float | Float[AnyArray, ""], cap: bool
) -> Float[Array, "B K N"]:
    """A background column before the classes: 1 for groups whose best class is below the threshold.

    Args:
      cap: lower the threshold to the window's best probability where it is above it.
    """
    p = jnp.asarray(p)
    best = jnp.max(p, axis=-1, keepdims=True)
    threshold = jnp.asarray(threshold, jnp.float32)
    if cap:
        threshold = jnp.minimum(threshold, jnp.max(best, axis=1, keepdims=True))
    return jnp.concatenate([(best < threshold).astype(p.dtype), p], axis=-1)


@functools.partial(jax.jit, static_argnames=("size",))
def pixel_groups(
    soft: Float[AnyArray, "windows h w K"], size: tuple[int, int]
) -> Int[Array, "windows H W"]:
    """The best group of each pixel of each window, after bilinear upsampling."""
    rows, columns = (bilinear_weights(n, m) for n, m in zip(size, soft.shape[1:3], strict=True))
    return jnp.argmax(spread(soft, rows, columns), axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("corners", "width"))
def label_band(
    members: Int[AnyArray, "windows h w"],
    tables: Float[AnyArray, "windows K N"],
    row: Int[AnyArray, " R"],
    rows: tuple[AnyArray, AnyArray, AnyArray],
    columns: tuple[AnyArray, AnyArray, AnyArray],
    corners: tuple[tuple[int, int], ...],
    width: int,
) -> Int[Array, "H W"]:
    """Labels of some rows of the original image: the column of the table that wins each pixel.

    Args:
      members: group of each pixel of each window.
      tables: scores of the pixels of each group.
      row: the rows of the segmented image that they are interpolated from.
      rows, columns: taps from the segmented to the original image, see `windows.bilinear_taps`;
        those of rows are positions in `row`.
      corners: (top, left) of each window in the segmented image.
      width: of that image.
    """
    row = jnp.asarray(row)
    height, across = members.shape[1:]
    total = jnp.zeros((row.shape[0], width, tables.shape[-1]), jnp.float32)
    cover = jnp.zeros((row.shape[0], width, 1), jnp.float32)
    for index, (top, left) in enumerate(corners):
        inside = ((row >= top) & (row < top + height))[:, None, None].astype(jnp.float32)
        scores = tables[index][members[index][jnp.clip(row - top, 0, height - 1)]]
        # Padded and added: XLA makes a scatter of `.at[].add`, which is slow on a CPU.
        around = ((0, 0), (left, width - left - across), (0, 0))
        total += jnp.pad(scores * inside, around)
        cover += jnp.pad(jnp.broadcast_to(inside, (row.shape[0], across, 1)), around)
    mean = total / cover
    low, high, part = (jnp.asarray(x) for x in rows)
    part = part[:, None, None]
    mean = mean[low] * (1.0 - part) + mean[high] * part
    low, high, part = (jnp.asarray(x) for x in columns)
    part = part[None, :, None]
    mean = mean[:, low] * (1.0 - part) + mean[:, high] * part
    return jnp.argmax(mean, axis=-1).astype(jnp.int32)


def label_image(
    soft: Float[np.ndarray, "windows h w K"],
    p: Float[AnyArray, "windows K C"],
    *,
    window: tuple[int, int],
    corners: tuple[tuple[int, int], ...],
    resized: tuple[int, int],
    size: tuple[int, int],
    threshold: float | None,
    cap: bool,
    classes: Int[np.ndarray, " words"],
    band_floats: int,
) -> Int[np.ndarray, "H W"]:
    """The label map of an image: 0 for background and 1 + class, or the class without threshold.

    Args:
      soft: affinity of each window's patches to the groups.
      p: see `group_probabilities`.
      window: (height, width) of the windows.
      corners: (top, left) of each window.
      resized, size: (height, width) of the image that was segmented, and of the original.
      cap: see `with_background`.
      classes: the class of each word, -1 for background.
      band_floats: scores that exist at once; larger images are labeled in bands of rows.
    """
    tables = jnp.asarray(p) if threshold is None else with_background(p, threshold, cap)
    members = pixel_groups(soft, window)
    down, across = (bilinear_taps(n, m) for n, m in zip(size, resized, strict=True))
    # Rows of the mean over windows, twice, and of the result exist together.
    band = max(1, min(size[0], band_floats // (3 * max(size[1], resized[1]) * tables.shape[-1])))
    bands = [tuple(x[start : start + band] for x in down) for start in range(0, size[0], band)]
    bands[-1] = tuple(np.pad(x, (0, band - len(x)), mode="edge") for x in bands[-1])
    # Rows that two rows of the original image share are made once.
    needed = [np.unique(np.concatenate([low, high])) for low, high, _ in bands]
    most = max(len(row) for row in needed)
    winners = []
    for row, (low, high, part) in zip(needed, bands, strict=True):
        taps = np.searchsorted(row, low), np.searchsorted(row, high), part
        row = np.pad(row, (0, most - len(row)), mode="edge")
        made = label_band(members, tables, row, taps, across, corners=corners, width=resized[1])
        winners.append(np.asarray(made))
    # The winning column of the table: the background, if there is one, then the words.
    labels = classes if threshold is None else np.concatenate([[0], classes + 1])
    return labels.astype(np.int32)[np.concatenate(winners)[: size[0]]]
