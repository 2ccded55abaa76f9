"""Zero-shot evaluation of a segmenter on a benchmark, and the result file."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.benchmarks import Benchmark
from ovseg_jax.segmentation.labels import label_maps
from ovseg_jax.segmentation.metric import ConfusionMatrix
from ovseg_jax.segmentation.protocol import Protocol, names_hash
from ovseg_jax.segmentation.scores import (
    Encode,
    ImageScores,
    Segmenter,
    image_scores,
    with_scale,
    without_index,
)
from ovseg_jax.shapes import UInt8


def scored_benchmark(
    segmenter: Segmenter,
    benchmark: Benchmark,
    protocol: Protocol,
    *,
    batch_size: int = 32,
    encode: Encode | None = None,
) -> Iterator[tuple[ImageScores, UInt8[np.ndarray, "H W"]]]:
    """Class scores and true labels of each image: what `calibrate` takes.

    Args:
      encode: instead of `segmenter.encode`, see `scores.Encode`.
    """
    text = segmenter.text(list(benchmark.class_names), protocol.templates)
    truths = {}

    def images():
        for index in range(len(benchmark)):
            image, truths[index] = benchmark[index]
            yield image

    encode = encode or without_index(segmenter.encode)
    for scores in image_scores(encode, text, images(), protocol, batch_size):
        yield scores, truths.pop(scores.index)


def evaluate(
    segmenter: Segmenter,
    benchmark: Benchmark,
    protocol: Protocol,
    *,
    batch_size: int = 32,
    encode: Encode | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The result of one benchmark: plain values, ready for JSON.

    Args:
      batch_size: windows in one call of the encoder.
      encode: instead of `segmenter.encode`, see `scores.Encode`.
      progress: called with (images done, images in all).

    Raises:
      UserError: a benchmark with background and a protocol without a threshold.
    """
    protocol = with_scale(protocol.for_benchmark(benchmark.name), segmenter)
    if not benchmark.has_background:
        protocol = protocol.replace(threshold=None)
    elif protocol.threshold is None:
        raise UserError(
            f"benchmark {benchmark.name} has a background but the protocol has no threshold: "
            "set one, or find it on a tune split"
        )
    confusion = ConfusionMatrix.empty(len(benchmark.class_names) + benchmark.has_background)
    truths, clock, done = {}, _Clock(), 0

    def scores():
        options = {"batch_size": batch_size, "encode": encode}
        for one, truth in scored_benchmark(segmenter, benchmark, protocol, **options):
            truths[one.index] = truth
            yield one

    for one, labels in label_maps(scores(), protocol, group=batch_size):
        confusion.update(labels, truths.pop(one.index))
        done += 1
        if done % batch_size == 0 or done == len(benchmark):
            clock.tick(done)
            if progress:
                progress(done, len(benchmark))
    return {
        "benchmark": benchmark.name,
        **summary(confusion, benchmark),
        "images": done,
        "seconds": round(clock.seconds(), 3),
        "images_per_second": round(clock.rate(), 3),
        "data": benchmark.describe(),
        "protocol": {
            **protocol.as_dict(),
            "background": benchmark.has_background,
            "classes": len(benchmark.class_names),
            "class_names_hash": names_hash(benchmark.class_names),
        },
    }


def summary(confusion: ConfusionMatrix, benchmark: Benchmark) -> dict[str, Any]:
    """Every measure of a confusion matrix, in percent; None where it is not defined.

    `miou` is over all labels, background included; `miou_seen` and `miou_unseen` are over the
    classes that training captions name or never name, without background. `all_background_miou` is
    what labeling everything background would get on the same images.
    """
    first = int(benchmark.has_background)
    names = ["background"] * first + list(benchmark.class_names)
    unseen = {first + i for i in benchmark.unseen}
    seen = [i for i in range(first, len(names)) if i not in unseen]
    result = {
        "miou": confusion.miou(),
        "miou_seen": confusion.miou(seen),
        "miou_unseen": confusion.miou(sorted(unseen)),
        "pixel_accuracy": confusion.pixel_accuracy(),
        "mean_accuracy": confusion.mean_accuracy(),
        "frequency_weighted_iou": confusion.frequency_weighted_iou(),
    }
    if benchmark.has_background:
        result["all_background_miou"] = confusion.all_background().miou()
    result = {name: _percent(value) for name, value in result.items()}
    per_class = zip(names, confusion.iou(), strict=True)
    return {**result, "iou": {name: _percent(value) for name, value in per_class}}


def write_result(path: str | Path, result: dict[str, Any]) -> None:
    """Writes a result as JSON; a reader never finds half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _percent(value: float) -> float | None:
    return None if math.isnan(value) else round(100 * float(value), 4)


class _Clock:
    """Rate after the first batch, which waits for compilation; of everything if it is all."""

    def __init__(self):
        self.start = time.perf_counter()
        self.ticks: list[tuple[int, float]] = []

    def tick(self, done: int) -> None:
        self.ticks.append((done, time.perf_counter()))

    def seconds(self) -> float:
        return (self.ticks[-1][1] if self.ticks else time.perf_counter()) - self.start

    def rate(self) -> float:
        first, last = (self.ticks[0], self.ticks[-1]) if len(self.ticks) > 1 else (None, None)
        if first is None:
            return self.ticks[-1][0] / self.seconds() if self.ticks else 0.0
        return (last[0] - first[0]) / max(last[1] - first[1], 1e-9)
