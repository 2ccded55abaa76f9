"""What an evaluation counts, as integers that add up over images and processes."""

import math
from typing import Any

import numpy as np
from jaxtyping import Integer

from ovseg_jax.segmentation.metric import ConfusionMatrix
from ovseg_jax.segmentation.parts import Gather
from ovseg_jax.segmentation.scores import ImageScores

MICRO = 10**6


class Counts:
    """Counts over the images that were done.

    Attributes:
      confusion: pixels [truth, prediction].
      images: how many.
      clock: (seconds, images a second); of several processes the longest, and the sum.

    Args:
      labels: number of labels, background included. total: images of the whole benchmark.
    """

    def __init__(self, labels: int, total: int):
        self.confusion = ConfusionMatrix.empty(labels)
        self.images = 0
        self.clock = (0.0, 0.0)
        # Windows; groups used in them; their entropy in millionths; groups that the model has.
        self._usage = np.zeros(4, np.int64)
        # For each image 1 + its mIoU in millionths; 0 where it is not done, or has no pixel.
        self._by_image = np.zeros(total, np.int64)

    def add(
        self,
        one: ImageScores,
        labels: Integer[np.ndarray, "H W"],
        truth: Integer[np.ndarray, "H W"],
    ) -> None:
        """Counts one image."""
        alone = ConfusionMatrix.empty(len(self.confusion.counts)).update(labels, truth)
        self.confusion += alone
        if not math.isnan(alone.miou()):
            self._by_image[one.index] = 1 + round(alone.miou() * MICRO)
        groups = one.group_cosines.shape[1]
        for window in one.windows_of(one.groups):
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
        """mIoU of each image alone, percent; None where it has no pixel that counts."""
        return [percent((x - 1) / MICRO) if x else None for x in self._by_image.tolist()]


def percent(value: float) -> float | None:
    """A share as percent with four digits; None for NaN."""
    return None if math.isnan(value) else round(100 * float(value), 4)
