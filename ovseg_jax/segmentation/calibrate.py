"""Scales and threshold of the background rule, chosen on a split that is not reported.

For one pair of scales, the labels at every threshold follow from the best class of each pixel and
its probability: below the threshold the pixel is background, above it the label does not change.
So pixels are counted once by (probability bin, best class, truth), and sums over bins are the
confusion matrices of all thresholds.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Integer

from ovseg_jax.errors import UserError
from ovseg_jax.segmentation import readout
from ovseg_jax.segmentation.metric import IGNORE, ConfusionMatrix
from ovseg_jax.segmentation.scores import ImageScores
from ovseg_jax.shapes import Float

SCALES = (5.0, 10.0, 20.0, 40.0, 70.0, 100.0)
IMAGE_SCALES = (0.0, 3.0, 5.0)
THRESHOLDS = tuple(i / 200 for i in range(200))


@dataclass(frozen=True)
class Calibration:
    """The best settings, and the mIoU (0..1) at all that were tried.

    Attributes:
      scale, image_scale, threshold: for `protocol.Protocol`.
      miou: theirs, on the split used.
      table: for each pair of scales: scale, image scale, their best threshold, miou.
      curves: mIoU [pair, threshold].
    """

    scale: float
    image_scale: float
    threshold: float
    miou: float
    table: tuple[tuple[float, float, float, float], ...]
    curves: Float[np.ndarray, "pairs thresholds"]


def calibrate(
    scored: Iterable[tuple[ImageScores, Integer[np.ndarray, "H W"]]],
    scales: Sequence[float] = SCALES,
    image_scales: Sequence[float] = IMAGE_SCALES,
    thresholds: Sequence[float] = THRESHOLDS,
    order: str = "upsample_first",
    batch_size: int = 16,
    owners: Sequence[int] | None = None,
    cap: bool = False,
) -> Calibration:
    """The scales and the threshold with the highest mIoU, background included.

    Args:
      scored: for each image its scores and its true labels (0 background, 1 + class, 255 ignored).
        Consecutive images of equal shape are worked on together.
      thresholds: in rising order.
      owners: the class of each word that was scored, -1 for background; by default every word is a
        class.
      cap: whether the best pixels of an image are found at any threshold, see
        `Protocol.cap_threshold`.

    Raises:
      UserError: no image, or true labels beyond the classes.
    """
    readout.check_order(order)
    edges = np.asarray(thresholds, np.float32)
    if not len(edges) or (np.diff(edges) <= 0).any():
        raise UserError("calibration needs thresholds in rising order")
    pairs = list(itertools.product(scales, image_scales))
    counts = None
    for cells, *evidence, weights, truth in _batches(scored, batch_size, order == "argmax_first"):
        words = cells.shape[-1]
        if counts is None:
            word_class = np.arange(words) if owners is None else np.asarray(owners)
            classes = int(word_class.max()) + 1
            counts = np.zeros((len(pairs), len(edges) + 1, words, classes + 1), np.int64)
        valid = truth != IGNORE
        labels = truth[valid].astype(np.int64)
        if labels.size and labels.max() > classes:
            raise UserError(f"true label {labels.max()}, but there are {classes} classes")
        for i, (scale, image_scale) in enumerate(pairs):
            p, best = _best(
                cells, *evidence, float(scale), float(image_scale), *weights, order, cap
            )
            # A pixel in bin j is found at the thresholds 0..j-1, those not above its probability.
            bins = np.searchsorted(edges, np.asarray(p)[valid], side="right")
            joint = (bins * words + np.asarray(best)[valid]) * (classes + 1) + labels
            counts[i] += np.bincount(joint, minlength=counts[i].size).reshape(counts[i].shape)
    if counts is None:
        raise UserError("calibration needs at least one image")
    curves = np.array([[m.miou() for m in _matrices(by_bin, word_class)] for by_bin in counts])
    if np.isnan(curves).all():
        raise UserError("calibration found no pixel that is not ignored")
    best = curves.argmax(1)
    table = tuple(
        (float(scale), float(image_scale), float(thresholds[j]), float(curve[j]))
        for (scale, image_scale), j, curve in zip(pairs, best, curves, strict=True)
    )
    return Calibration(*max(table, key=lambda row: row[-1]), table, curves)


def _batches(scored, size, nearest):
    """Stacks of images of equal shape: cells, margins, foreground, the weights from cells to
    pixels, truth."""
    same = []
    for scores, truth in scored:
        if truth.shape != scores.size:
            raise UserError(f"image of {scores.size} pixels, but its truth has {truth.shape}")
        if same and (len(same) == size or same[0][0].shapes != scores.shapes):
            yield _stack(same, size, nearest)
            same = []
        same.append((scores, truth))
    if same:
        yield _stack(same, size, nearest)


def _stack(same, size, nearest):
    cells = np.stack([scores.cells for scores, _ in same])
    margins = np.stack([scores.image_margins() for scores, _ in same])
    foreground = np.stack([scores.foreground_or_zero() for scores, _ in same])
    truth = np.stack([labels for _, labels in same])
    # One shape for any number of images, so that nothing is compiled again.
    padding = ((0, size - len(same) if len(same) > 1 else 0), (0, 0), (0, 0))
    truth = np.pad(truth, padding, constant_values=IGNORE)
    arrays = (np.pad(array, (*padding, (0, 0))) for array in (cells, margins, foreground))
    return *arrays, same[0][0].weights(nearest=nearest), truth


@jax.jit(static_argnames=("order", "cap"))
def _best(cells, margins, foreground, scale, image_scale, rows, columns, order, cap):
    """Highest probability and its class at each pixel; with `cap` the probability of the best
    pixels of an image is infinite."""
    p = readout.probabilities(cells, scale)
    p = readout.held_to_image(p, margins, image_scale, foreground)
    if order == "upsample_first":
        p = readout.spread(p, rows, columns)
    highest, best = p.max(-1), p.argmax(-1)
    if cap:
        of_image = highest.max((1, 2), keepdims=True)
        highest = jnp.where(highest >= of_image, jnp.inf, highest)
    if order == "upsample_first":
        return highest, best
    rows, columns = jnp.argmax(rows, 1), jnp.argmax(columns, 1)
    return tuple(x[:, rows][:, :, columns] for x in (highest, best))


def _matrices(
    by_bin: Integer[np.ndarray, "bins words labels"], word_class: Integer[np.ndarray, " words"]
) -> list[ConfusionMatrix]:
    """The confusion matrix of each threshold."""
    total = by_bin.sum((0, 1))
    # What a word for the background wins is background at every threshold.
    by_class = np.zeros((len(by_bin), word_class.max() + 1, by_bin.shape[2]), by_bin.dtype)
    for number, words in ((c, word_class == c) for c in range(by_class.shape[1])):
        by_class[:, number] = by_bin[:, words].sum(1)
    matrices = []
    # found[j]: pixels in the bins above j, those whose probability reaches threshold j.
    found = by_class[::-1].cumsum(0)[::-1][1:]
    for foreground in found:
        counts = np.concatenate([(total - foreground.sum(0))[:, None], foreground.T], 1)
        matrices.append(ConfusionMatrix(counts))
    return matrices
