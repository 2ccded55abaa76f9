"""Mean intersection over union, from a confusion matrix that adds up over images and processes.

Intersection and union are summed over the whole data set before they are divided; a class whose
union is empty (neither drawn nor predicted anywhere) is left out of the mean.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer

from ovseg_jax.errors import UserError
from ovseg_jax.shapes import Float

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
        """Mean, over the classes in the truth, of the share of their pixels found."""
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
