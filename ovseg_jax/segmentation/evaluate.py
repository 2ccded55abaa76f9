"""Zero-shot evaluation of a segmenter on a benchmark, and the result file."""

import dataclasses
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ovseg_jax.errors import UserError
from ovseg_jax.files import replace_file
from ovseg_jax.segmentation.benchmarks import Benchmark, words_of
from ovseg_jax.segmentation.labels import label_maps
from ovseg_jax.segmentation.metric import ConfusionMatrix, Counts, Gather, percent
from ovseg_jax.segmentation.protocol import Protocol, is_named, names_hash, protocol_notes
from ovseg_jax.segmentation.scores import ImageScores, Segmenter, score_images, with_scale
from ovseg_jax.shapes import UInt8


def scored_benchmark(
    segmenter: Segmenter,
    benchmark: Benchmark,
    protocol: Protocol,
    *,
    batch_size: int = 32,
    part: tuple[int, int] = (0, 1),
) -> Iterator[tuple[ImageScores, UInt8[np.ndarray, "H W"]]]:
    """Scores of the words and true labels of each image: what `calibrate` takes.

    Args:
      part: (p, n) for every n-th image from image p on. The scores' index is still the image's
        number in the whole benchmark.
    """
    vocabulary, _ = words_of(benchmark, protocol)
    numbers, truths = range(part[0], len(benchmark), part[1]), {}

    def images():
        for place, number in enumerate(numbers):
            image, truths[place] = benchmark[number]
            yield image

    for scores in score_images(segmenter, vocabulary, images(), protocol, batch_size):
        truth = truths.pop(scores.index)
        yield dataclasses.replace(scores, index=numbers[scores.index]), truth


def protocol_of(benchmark: Benchmark, protocol: Protocol, segmenter: Segmenter) -> Protocol:
    """The protocol with the benchmark's fields, and with the scale that the model learned if it
    has none."""
    protocol = with_scale(protocol.for_benchmark(benchmark.name), segmenter)
    return protocol if benchmark.has_background else protocol.replace(threshold=None)


def evaluate(
    segmenter: Segmenter,
    benchmark: Benchmark,
    protocol: Protocol,
    *,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
    part: tuple[int, int] = (0, 1),
    gather: Gather | None = None,
) -> dict[str, Any]:
    """The result of one benchmark: plain values, ready for JSON.

    Args:
      batch_size: windows in one call of the encoder.
      progress: called with (images done, images in all).
      part: (p, n), the share of the images that this process evaluates, see `scored_benchmark`.
      gather: collects the counts of all parts, such as `metric.gather_counts`. The result is then
        that of the whole benchmark, whatever the number of parts.

    Raises:
      UserError: a benchmark with background and a protocol without a threshold.
    """
    open_scale = protocol.scale is None
    protocol = protocol_of(benchmark, protocol, segmenter)
    if benchmark.has_background and protocol.threshold is None:
        raise UserError(
            f"benchmark {benchmark.name} has a background but the protocol has no threshold: "
            "set one, or find it on a tune split"
        )
    vocabulary, names_file = words_of(benchmark, protocol)
    counts = Counts(len(vocabulary.classes) + benchmark.has_background, len(benchmark))
    total = len(range(part[0], len(benchmark), part[1]))
    truths, done = {}, 0
    start = time.perf_counter()
    warm = (0, start)  # (images, time) after the first batch, which waits for compilation

    def scores():
        options = {"batch_size": batch_size, "part": part}
        for scored_image, truth in scored_benchmark(segmenter, benchmark, protocol, **options):
            truths[scored_image.index] = truth
            yield scored_image

    for scored_image, labels in label_maps(
        scores(), protocol, vocabulary.word_to_class, group=batch_size
    ):
        counts.add(scored_image, labels, truths.pop(scored_image.index))
        done += 1
        if done == batch_size < total:
            warm = (done, time.perf_counter())
        if progress and (done % batch_size == 0 or done == total):
            progress(done, total)
    end = time.perf_counter()
    counts.images = done
    counts.clock = (end - start, (done - warm[0]) / max(end - warm[1], 1e-9))
    if gather is not None:
        counts = counts.joined(gather)
    seconds, rate = counts.clock
    return {
        "benchmark": benchmark.name,
        **summary(counts.confusion, benchmark),
        "images": counts.images,
        "seconds": round(seconds, 3),
        "images_per_second": round(rate, 3),
        "group_usage": counts.group_usage(),
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
        "confusion": counts.confusion.counts.tolist(),
        "image_miou": counts.image_miou(),
    }


def summary(confusion: ConfusionMatrix, benchmark: Benchmark) -> dict[str, Any]:
    """Every measure of a confusion matrix, in percent; None where it is not defined.

    `miou` is over all labels, background included; `miou_seen` and `miou_unseen` (Table 7) are over
    the classes that training captions name or never name, without background; `zss` (Table 2) over
    the classes that zero-shot segmentation leaves out, with all classes competing.
    `all_background_miou` is what labeling everything background would get on the same images.
    """
    first = int(benchmark.has_background)
    names = ["background"] * first + list(benchmark.class_names)
    unseen = {first + i for i in benchmark.unseen}
    seen = [i for i in range(first, len(names)) if i not in unseen]
    paper_counts = getattr(benchmark, "paper_counts", None)
    known = bool(unseen) or paper_counts is not None
    result = {
        "miou": confusion.miou(),
        "miou_seen": confusion.miou(seen) if known else math.nan,
        "miou_unseen": confusion.miou(sorted(unseen)),
        "pixel_accuracy": confusion.pixel_accuracy(),
        "mean_accuracy": confusion.mean_accuracy(),
        "frequency_weighted_iou": confusion.frequency_weighted_iou(),
    }
    if benchmark.has_background:
        result["all_background_miou"] = confusion.all_background().miou()
    result = {name: percent(value) for name, value in result.items()}
    if known:
        result["entities"] = {"seen": len(seen), "unseen": len(unseen), "in_paper": paper_counts}
    if zss := getattr(benchmark, "zss", ()):
        result["zss"] = {
            "classes": [benchmark.class_names[i] for i in zss],
            "miou": percent(confusion.miou([first + i for i in zss])),
        }
    per_class = zip(names, confusion.iou(), strict=True)
    return {**result, "iou": {name: percent(value) for name, value in per_class}}


def write_result(path: str | Path, result: dict[str, Any]) -> None:
    """Writes a result as JSON with one line per field, and one per row of long lists of numbers.

    Raises:
      UserError: it cannot be written.
    """
    text = json.dumps(result, indent=2, allow_nan=False)
    numbers = re.compile(r"\[\s+(-?[\d.e+-]+|null)(,\s+(-?[\d.e+-]+|null))*\s+\]")
    replace_file(Path(path), numbers.sub(lambda row: re.sub(r"\s+", " ", row[0]), text) + "\n")
