"""What an evaluation counts, as integers that add up over images and processes, and mean IoU.

Intersection and union are summed over the whole data set before they are divided. A class whose
union is empty (neither drawn nor predicted anywhere) is left out of the mean.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int64, Integer

from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.scores import ImageScores
from ovseg_jax.shapes import Float

# Counts of one process -> counts of all, one row each.
Gather = Callable[[Int64[np.ndarray, " counts"]], Int64[np.ndarray, "processes counts"]]
MICRO = 10**6

IGNORE = 255  # pixels of the truth that count for nothing


class ConfusionMatrix:
    """Pixel counts [truth, prediction] in int64.

    `a + b` is the matrix of both sets of images, and `ConfusionMatrix.empty(C)` the identity of
    that sum, so parts may be counted anywhere and in any order.
    """

    def __init__(self, counts: Integer[np.ndarray, "C C"]):
        self.counts = counts.astype(np.int64)

    @classmethod
    def empty(cls, classes: int) -> "ConfusionMatrix":
        """No pixel counted yet. `classes` includes the background where there is one."""
        return cls(np.zeros((classes, classes), np.int64))

    def update(
        self,
        prediction: Integer[np.ndarray, "..."],
        truth: Integer[np.ndarray, "..."],
        ignore: int = IGNORE,
    ) -> "ConfusionMatrix":
        """Counts the pixels of one label map (or a stack of them), in place; returns itself.

        Args:
          prediction, truth: labels 0..C-1 of equal shape; pixels with truth == `ignore` are left
            out, whatever is predicted there.

        Raises:
          UserError: unequal shapes, or a label out of range.
        """
        if prediction.shape != truth.shape:
            raise UserError(
                f"the label map has shape {prediction.shape} but its truth {truth.shape}: "
                "the prediction must be made at the size of the truth"
            )
        valid = truth != ignore
        t, p = truth[valid].astype(np.int64), prediction[valid].astype(np.int64)
        classes = len(self.counts)
        for what, labels in (("truth", t), ("prediction", p)):
            if labels.size and not (0 <= labels.min() and labels.max() < classes):
                raise UserError(
                    f"the {what} has labels {labels.min()}..{labels.max()}, but there are "
                    f"{classes} classes (0..{classes - 1}); {ignore} is ignored in the truth"
                )
        joint = np.bincount(t * classes + p, minlength=classes**2)
        self.counts += joint.reshape(classes, classes)
        return self

    def __add__(self, other: "ConfusionMatrix") -> "ConfusionMatrix":
        if len(self.counts) != len(other.counts):
            raise UserError(
                f"cannot add the counts of {len(self.counts)} and of {len(other.counts)} classes"
            )
        return ConfusionMatrix(self.counts + other.counts)

    @property
    def truth_pixels(self) -> Integer[np.ndarray, " C"]:
        """Pixels of each class in the truth."""
        return self.counts.sum(1)

    def iou(self) -> Float[np.ndarray, " C"]:
        """Intersection over union of each class, 0..1; NaN where the union is empty."""
        hit = np.diag(self.counts)
        return _ratio(hit, self.counts.sum(0) + self.truth_pixels - hit)

    def miou(self, classes: Sequence[int] | None = None) -> float:
        """Mean IoU over `classes` (all by default) with a non-empty union; NaN if there is none."""
        iou = self.iou() if classes is None else self.iou()[list(classes)]
        known = iou[~np.isnan(iou)]
        return float(known.mean()) if known.size else float("nan")

    def pixel_accuracy(self) -> float:
        """Share of the counted pixels that have the right label; NaN without pixels."""
        return float(_ratio(np.trace(self.counts), self.counts.sum()))

    def mean_accuracy(self) -> float:
        """Mean over the classes in the truth of the share of their pixels that are right."""
        accuracy = _ratio(np.diag(self.counts), self.truth_pixels)
        known = accuracy[~np.isnan(accuracy)]
        return float(known.mean()) if known.size else float("nan")

    def frequency_weighted_iou(self) -> float:
        """IoU averaged with the share of each class in the truth as its weight."""
        pixels = self.truth_pixels
        drawn = pixels > 0
        return float(_ratio(np.sum(pixels[drawn] * self.iou()[drawn]), pixels.sum()))

    def all_background(self) -> "ConfusionMatrix":
        """The counts of predicting label 0 everywhere, on the same truth: a baseline for free."""
        counts = np.zeros_like(self.counts)
        counts[:, 0] = self.truth_pixels
        return ConfusionMatrix(counts)


def _ratio(above, below) -> Float[np.ndarray, "..."]:
    above, below = np.broadcast_arrays(np.float64(above), np.float64(below))
    return np.divide(above, below, out=np.full(below.shape, np.nan), where=below > 0)


class Counts:
    """Counts over the images that were evaluated.

    Attributes:
      confusion: pixels [truth, prediction].
      images: how many.
      clock: (seconds, images a second); over several processes the longest, and the sum.

    Args:
      labels: number of labels, background included.
      total: images of the whole benchmark.
    """

    def __init__(self, labels: int, total: int):
        self.confusion = ConfusionMatrix.empty(labels)
        self.images = 0
        self.clock = (0.0, 0.0)
        # Windows; groups used in them; their entropy in millionths; groups that the model has.
        self._usage = np.zeros(4, np.int64)
        # For each image 1 + its mIoU in millionths; 0 where it was not evaluated, or has no pixel.
        self._by_image = np.zeros(total, np.int64)

    def add(
        self,
        scored_image: ImageScores,
        labels: Integer[np.ndarray, "H W"],
        truth: Integer[np.ndarray, "H W"],
    ) -> None:
        """Counts one image."""
        of_image = ConfusionMatrix.empty(len(self.confusion.counts)).update(labels, truth)
        self.confusion += of_image
        if not math.isnan(of_image.miou()):
            self._by_image[scored_image.index] = 1 + round(of_image.miou() * MICRO)
        groups = scored_image.group_cosines.shape[1]
        for window in scored_image.windows_of(scored_image.groups):
            share = np.bincount(window.ravel(), minlength=groups) / window.size
            used = share[share > 0]
            # A single group has no entropy to be compared with.
            entropy = -np.sum(used * np.log(used)) / math.log(max(groups, 2))
            self._usage[:3] += (1, len(used), round(entropy * MICRO))
        self._usage[3] = groups

    def joined(self, gather: Gather) -> "Counts":
        """The counts of all processes."""
        labels, total = len(self.confusion.counts), len(self._by_image)
        times = np.array([round(x * MICRO) for x in self.clock], np.int64)
        packed = [self.confusion.counts.ravel(), np.array([self.images], np.int64)]
        rows = gather(np.concatenate([*packed, times, self._usage, self._by_image]))
        whole = Counts(labels, total)
        ends = np.cumsum([labels**2, 1, 2, 4])
        counts, images, times, usage, by_image = np.split(rows, ends, axis=1)
        whole.confusion = ConfusionMatrix(counts.sum(0).reshape(labels, labels))
        whole.images = int(images.sum())
        whole.clock = (times[:, 0].max() / MICRO, times[:, 1].sum() / MICRO)
        whole._usage = np.append(usage[:, :3].sum(0), usage[:, 3].max())
        whole._by_image = by_image.sum(0)
        return whole

    def group_usage(self) -> dict[str, Any]:
        """How many groups a window's patches spread over, and how evenly (0 one, 1 all alike)."""
        windows, used, entropy, groups = (int(x) for x in self._usage)
        return {
            "groups": groups,
            "used": round(used / max(windows, 1), 3),
            "entropy": round(entropy / MICRO / max(windows, 1), 4),
            "windows": windows,
        }

    def image_miou(self) -> list[float | None]:
        """mIoU of each image, percent; None where it has no pixel that counts."""
        return [percent((x - 1) / MICRO) if x else None for x in self._by_image.tolist()]


def percent(value: float) -> float | None:
    """A share as percent with four digits; None for NaN."""
    return None if math.isnan(value) else round(100 * float(value), 4)


# ---- several processes


def this_part() -> tuple[int, int]:
    """(number of this process, number of processes); a process takes every images-th image."""
    return jax.process_index(), jax.process_count()


def gather_counts(counts: Int64[np.ndarray, " counts"]) -> Int64[np.ndarray, "processes counts"]:
    """The counts of every process, on every process.

    Pixels of a whole data set need 64 bits, which JAX arrays do not have by default, so their bytes
    travel.
    """
    if jax.process_count() == 1:
        return counts[None]
    rows = multihost_utils.process_allgather(counts.view(np.uint8))
    return np.ascontiguousarray(rows).view(np.int64)
