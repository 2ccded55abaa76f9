"""Zero-shot evaluation of a segmenter on a benchmark: what is counted, and the result file."""

import dataclasses
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int64, Integer

from ovseg_jax.data.benchmarks.class_tables import IGNORE
from ovseg_jax.errors import UserError
from ovseg_jax.files import replace_file
from ovseg_jax.segmentation.benchmarks import Benchmark, words_of
from ovseg_jax.segmentation.labels import label_maps
from ovseg_jax.segmentation.protocol import Protocol, is_named, names_hash, protocol_notes
from ovseg_jax.segmentation.scores import ImageScores, Segmenter, image_scores, with_scale
from ovseg_jax.shapes import Float

# Counts of one process -> counts of all, one row each.
Gather = Callable[[Int64[np.ndarray, " counts"]], Int64[np.ndarray, "processes counts"]]
MICRO = 10**6


def scored_benchmark(
    segmenter: Segmenter,
    benchmark: Benchmark,
    protocol: Protocol,
    batch_size: int = 32,
    numbers: Sequence[int] | None = None,
) -> Iterator[ImageScores]:
    """Scores of the words, with true labels, of the images with these numbers, or of all; their
    index is the image's number in the benchmark."""
    vocabulary, _ = words_of(benchmark, protocol)
    numbers, truths = range(len(benchmark)) if numbers is None else numbers, {}

    def images() -> Iterator[np.ndarray]:
        for position, number in enumerate(numbers):
            image, truths[position] = benchmark[number]
            yield image

    for scores in image_scores(segmenter, vocabulary, images(), protocol, batch_size):
        truth = truths.pop(scores.index)
        yield dataclasses.replace(scores, index=numbers[scores.index], truth=truth)


def protocol_of(benchmark: Benchmark, protocol: Protocol, segmenter: Segmenter) -> Protocol:
    """The protocol with the benchmark's fields, and with the scale that the model learned if it
    has none."""
    protocol = with_scale(protocol.for_benchmark(benchmark.name), segmenter)
    return protocol if benchmark.has_background else protocol.replace(threshold=None)


def count_pixels(
    prediction: Integer[np.ndarray, "..."], truth: Integer[np.ndarray, "..."], labels: int
) -> Int64[np.ndarray, "labels labels"]:
    """The confusion matrix [truth, prediction] of label maps, without the pixels whose truth is
    `IGNORE`; UserError for unequal shapes, or a label out of range."""
    if prediction.shape != truth.shape:
        shapes = f"shape {prediction.shape} but its truth {truth.shape}"
        raise UserError(f"the label map has {shapes}: it must be made at the size of the truth")
    valid = truth != IGNORE
    t, p = truth[valid].astype(np.int64), prediction[valid].astype(np.int64)
    for what, values in (("truth", t), ("prediction", p)):
        if values.size and not (0 <= values.min() and values.max() < labels):
            span = f"labels {values.min()}..{values.max()}"
            raise UserError(f"the {what} has {span}, but there are {labels} classes, from 0")
    return np.bincount(t * labels + p, minlength=labels**2).reshape(labels, labels)


def iou_of(confusion: Int64[np.ndarray, "C C"]) -> Float[np.ndarray, " C"]:
    """Intersection over union of each class, 0..1; NaN where it is neither drawn nor predicted."""
    hit = np.diag(confusion)
    return _ratio(hit, confusion.sum(0) + confusion.sum(1) - hit)


def mean_iou(confusion: Int64[np.ndarray, "C C"], classes: Sequence[int] | None = None) -> float:
    """Mean IoU over `classes` (all by default) that have one; NaN if there is none."""
    return _mean(iou_of(confusion) if classes is None else iou_of(confusion)[list(classes)])


def measures(confusion: Int64[np.ndarray, "C C"]) -> dict[str, float]:
    """Published measures of all labels, 0..1; NaN where nothing was counted."""
    hit, pixels = np.diag(confusion), confusion.sum(1)
    drawn = pixels > 0
    weighted = np.sum(pixels[drawn] * iou_of(confusion)[drawn])
    return {
        "miou": mean_iou(confusion),
        "pixel_accuracy": float(_ratio(np.trace(confusion), pixels.sum())),
        "mean_accuracy": _mean(_ratio(hit, pixels)),
        "frequency_weighted_iou": float(_ratio(weighted, pixels.sum())),
    }


def _ratio(above, below) -> Float[np.ndarray, "..."]:
    above, below = np.broadcast_arrays(np.float64(above), np.float64(below))
    return np.divide(above, below, out=np.full(below.shape, np.nan), where=below > 0)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def percent(value: float) -> float | None:
    """A share as percent with four digits; None for NaN."""
    return None if math.isnan(value) else round(100 * float(value), 4)


class Counts:
    """Integers of the evaluated images, which add up over processes: of `labels` labels, background
    included, in the `images` images of the whole benchmark."""

    def __init__(self, labels: int, images: int):
        self._all = np.zeros(labels**2 + images + 7, np.int64)
        ends = np.cumsum([labels**2, images, 3])
        # By image 1 + its mIoU in millionths; 0 where it was not evaluated, or has no pixel. Of
        # windows: how many, groups used in them, their entropy in millionths.
        confusion, self._by_image, self._windows, self._rest = np.split(self._all, ends)
        self.confusion = confusion.reshape(labels, labels)
        self.images = 0

    def add(self, scored_image: ImageScores, labels: np.ndarray) -> None:
        """Counts one image."""
        of_image = count_pixels(labels, scored_image.truth, len(self.confusion))
        self.confusion += of_image
        if not math.isnan(miou := mean_iou(of_image)):
            self._by_image[scored_image.index] = 1 + round(miou * MICRO)
        groups = scored_image.group_cosines.shape[1]
        for window in scored_image.windows_of(scored_image.groups):
            share = np.bincount(window.ravel(), minlength=groups) / window.size
            used = share[share > 0]
            # A single group has no entropy to be compared with.
            entropy = -np.sum(used * np.log(used)) / math.log(max(groups, 2))
            self._windows += (1, len(used), round(entropy * MICRO))
        self.images += 1
        self._rest[2] = groups

    def join(self, gather: Gather, rate: float, seconds: float) -> None:
        """Makes these the counts of all processes, after all images: `rate` images a second."""
        self._rest[[0, 1, 3]] = self.images, round(rate * MICRO), round(seconds * MICRO)
        rows = gather(self._all.copy())
        # Groups of the model and seconds, the last two, are no sums.
        self._all[:] = np.append(rows[:, :-2].sum(0), rows[:, -2:].max(0))

    def facts(self) -> dict[str, Any]:
        """Images, time, over how many groups a window's patches spread, how evenly (0 to 1), and
        the mIoU of each image in percent, None where it has no pixel that counts."""
        windows, used, entropy = (int(x) for x in self._windows)
        images, rate, groups, seconds = (int(x) for x in self._rest)
        return {
            "images": images,
            "seconds": round(seconds / MICRO, 3),
            "images_per_second": round(rate / MICRO, 3),
            "group_usage": {
                "groups": groups,
                "used": round(used / max(windows, 1), 3),
                "entropy": round(entropy / MICRO / max(windows, 1), 4),
                "windows": windows,
            },
            "image_miou": [
                percent((x - 1) / MICRO) if x else None for x in self._by_image.tolist()
            ],
        }


def gather_counts(counts: Int64[np.ndarray, " counts"]) -> Int64[np.ndarray, "processes counts"]:
    """The counts of every process, on every process."""
    # As bytes: pixels of a data set need 64 bits, which JAX arrays do not have by default.
    rows = multihost_utils.process_allgather(counts.view(np.uint8))
    return np.ascontiguousarray(rows).view(np.int64).reshape(-1, len(counts))


def evaluate(
    segmenter: Segmenter,
    benchmark: Benchmark,
    protocol: Protocol,
    *,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
    part: tuple[int, int] = (0, 1),
    gather: Gather = lambda counts: counts[None],
) -> dict[str, Any]:
    """The result of one benchmark: plain values, ready for JSON.

    Args:
      batch_size: windows in one call of the encoder.
      progress: called with (images done, images in all).
      part: (p, n) for every n-th image from image p on, the share of this process.
      gather: collects the counts of all parts, such as `gather_counts`, for the whole result.
    """
    open_scale = protocol.scale is None
    protocol = protocol_of(benchmark, protocol, segmenter)
    if benchmark.has_background and protocol.threshold is None:
        raise UserError(f"benchmark {benchmark.name} has a background: set a threshold")
    vocabulary, names_file = words_of(benchmark, protocol)
    counts = Counts(len(vocabulary.classes) + benchmark.has_background, len(benchmark))
    numbers = range(part[0], len(benchmark), part[1])
    start = time.perf_counter()
    warm = (0, start)  # (images, time) after the first batch, which waits for compilation
    scored = scored_benchmark(segmenter, benchmark, protocol, batch_size, numbers)
    for scored_image, labels in label_maps(
        scored, protocol, vocabulary.word_to_class, group=batch_size
    ):
        counts.add(scored_image, labels)
        done = counts.images
        if done == batch_size < len(numbers):
            warm = (done, time.perf_counter())
        if progress and (done % batch_size == 0 or done == len(numbers)):
            progress(done, len(numbers))
    end = time.perf_counter()
    counts.join(gather, (counts.images - warm[0]) / max(end - warm[1], 1e-9), end - start)
    return {
        "benchmark": benchmark.name,
        **summary(counts.confusion, benchmark),
        **counts.facts(),
        "data": benchmark.describe(),
        "protocol": {
            **protocol.as_dict(),
            "background": benchmark.has_background,
            "classes": len(vocabulary.classes),
            "words": list(vocabulary.lines()),
            "class_names_hash": names_hash(vocabulary.lines()),
            "class_names_file": names_file,
            "as_named": is_named(protocol, benchmark.name, open_scale),
            "notes": protocol_notes(protocol.name),
        },
        "confusion": counts.confusion.tolist(),
    }


def summary(confusion: Int64[np.ndarray, "C C"], benchmark: Benchmark) -> dict[str, Any]:
    """Every measure of a confusion matrix, in percent; None where it is not defined.

    `miou` is over all labels, background included; `miou_seen` and `miou_unseen` (Table 7) over the
    classes that training captions name or never name; `zss` (Table 2) over those left out by
    zero-shot segmentation; `all_background_miou` is what labeling all as background would get.
    """
    first = int(benchmark.has_background)
    names = ["background"] * first + list(benchmark.class_names)
    unseen = {first + i for i in benchmark.unseen}
    seen = [i for i in range(first, len(names)) if i not in unseen]
    paper_counts = getattr(benchmark, "paper_counts", None)
    known = bool(unseen) or paper_counts is not None
    result = measures(confusion)
    result["miou_seen"] = mean_iou(confusion, seen) if known else math.nan
    result["miou_unseen"] = mean_iou(confusion, sorted(unseen))
    if benchmark.has_background:
        background = np.zeros_like(confusion)
        background[:, 0] = confusion.sum(1)
        result["all_background_miou"] = mean_iou(background)
    result = {name: percent(value) for name, value in result.items()}
    if known:
        result["entities"] = {"seen": len(seen), "unseen": len(unseen), "in_paper": paper_counts}
    if zss := getattr(benchmark, "zss", ()):
        result["zss"] = {
            "classes": [benchmark.class_names[i] for i in zss],
            "miou": percent(mean_iou(confusion, [first + i for i in zss])),
        }
    per_class = zip(names, iou_of(confusion), strict=True)
    return {**result, "iou": {name: percent(value) for name, value in per_class}}


def write_result(path: str | Path, result: dict[str, Any]) -> None:
    """Writes a result as JSON with one line per field, and one per row of long lists of numbers."""
    text = json.dumps(result, indent=2, allow_nan=False)
    numbers = re.compile(r"\[\s+(-?[\d.e+-]+|null)(,\s+(-?[\d.e+-]+|null))*\s+\]")
    replace_file(Path(path), numbers.sub(lambda row: re.sub(r"\s+", " ", row[0]), text) + "\n")
