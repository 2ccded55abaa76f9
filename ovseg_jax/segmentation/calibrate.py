"""Scales and background threshold of a protocol, chosen on images that are not reported.

`calibrated` chooses all of them for a model that was just trained, `swept` only the threshold, for
any protocol.

For one pair of scales, the labels at every threshold follow from the best class of each pixel and
its probability. So `calibrate` counts pixels once by (probability bin, best class, truth), and sums
over bins are the confusion matrices of all thresholds.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Integer
from ml_collections import ConfigDict

from ovseg_jax.data.benchmarks import class_table
from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.benchmarks import Benchmark, benchmark_of, words_of
from ovseg_jax.segmentation.evaluate import evaluate, scored_benchmark
from ovseg_jax.segmentation.labels import (
    WordToClass,
    best_words,
    label_maps,
    runs_of_equal_shape,
)
from ovseg_jax.segmentation.metric import IGNORE, ConfusionMatrix, Gather
from ovseg_jax.segmentation.official_folders import FOLDERS
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.segmentation.scores import ImageScores, Segmenter, with_scale
from ovseg_jax.shapes import Float

# What `calibrate` tries.
SCALES = (5.0, 7.0, 10.0, 14.0, 20.0, 30.0, 45.0)
IMAGE_SCALES = (0.0, 3.0, 5.0)
THRESHOLDS = tuple(i / 200 for i in range(200))
# What `swept` tries: close to each other below 0.1, where the best thresholds of a softmax over
# many classes lie.
SWEPT_THRESHOLDS = (
    *(i / 100 for i in range(10)),
    *(i / 40 for i in range(4, 12)),
    *(i / 20 for i in range(6, 20)),
)


@dataclass(frozen=True)
class Calibration:
    """The best settings, and the mIoU (0..1) of all that were tried.

    Attributes:
      scale, image_scale, threshold: the best values of these fields of a protocol.
      miou: theirs, on the split used.
      curves: mIoU [pair of scales, threshold].
    """

    scale: float
    image_scale: float
    threshold: float
    miou: float
    curves: Float[np.ndarray, "pairs thresholds"]


def calibrate(
    scored: Iterable[tuple[ImageScores, Integer[np.ndarray, "H W"]]],
    protocol: Protocol,
    scales: Sequence[float] = SCALES,
    image_scales: Sequence[float] = IMAGE_SCALES,
    thresholds: Sequence[float] = THRESHOLDS,
    batch_size: int = 16,
    word_to_class: WordToClass = None,
) -> Calibration:
    """The scales and the threshold with the highest mIoU, background included.

    Args:
      scored: for each image its scores and its true labels (0 background, 1 + class, 255 ignored).
        Consecutive images of equal shape are processed together.
      protocol: all but the fields that are chosen.
      thresholds: in rising order.
      word_to_class: the class of each word that was scored, -1 for background; by default every
        word is a class.

    Raises:
      UserError: no image, no pixel that is not ignored, or true labels beyond the classes.
    """
    edges = np.asarray(thresholds, np.float32)
    pairs = list(itertools.product(map(float, scales), map(float, image_scales)))
    counts = None
    for same in runs_of_equal_shape(scored, batch_size, lambda pair: pair[0]):
        scores = [scored_image for scored_image, _ in same]
        if counts is None:
            words = scores[0].group_cosines.shape[-1]
            classes = np.arange(words) if word_to_class is None else np.asarray(word_to_class)
            labels = int(classes.max()) + 2
            counts = np.zeros((len(pairs), len(edges) + 1, labels, labels), np.int64)
        truth = np.stack([truth for _, truth in same])
        valid = truth != IGNORE
        truth = truth[valid].astype(np.int64)
        if truth.size and truth.max() >= labels:
            raise UserError(f"true label {truth.max()}, but there are {labels - 1} classes")
        for i, (scale, image_scale) in enumerate(pairs):
            tried = protocol.replace(scale=scale, image_scale=image_scale)
            highest, best = _pixels(scores, tried, batch_size)
            # A pixel in bin j has its class at the thresholds 0..j-1, those not above its
            # probability.
            bins = np.searchsorted(edges, highest[valid], side="right")
            joint = (bins * labels + classes[best[valid]] + 1) * labels + truth
            counts[i] += np.bincount(joint, minlength=counts[i].size).reshape(counts[i].shape)
    if counts is None:
        raise UserError("calibration needs at least one image")
    curves = np.array([_miou_of_thresholds(by_bin) for by_bin in counts])
    if np.isnan(curves).all():
        raise UserError("calibration saw no pixel that is not ignored")
    i, j = np.unravel_index(np.nanargmax(curves), curves.shape)
    return Calibration(*pairs[i], float(thresholds[j]), float(curves[i, j]), curves)


def _pixels(
    same: Sequence[ImageScores], protocol: Protocol, group: int
) -> tuple[Float[np.ndarray, "B H W"], Integer[np.ndarray, "B H W"]]:
    """Highest probability and its word at each pixel.

    Where the protocol caps thresholds, the probability of the best pixels of an image is infinite.
    """
    highest, best = best_words(same, protocol, group)
    if protocol.cap_threshold:
        of_image = highest.max((1, 2), keepdims=True)
        highest = np.where(highest >= of_image, np.inf, highest)
    if protocol.order == "argmax_first":
        rows, columns = (matrix.argmax(1) for matrix in same[0].weights(nearest=True))
        highest, best = (x[:, rows][:, :, columns] for x in (highest, best))
    return highest, best


def _miou_of_thresholds(by_bin: Integer[np.ndarray, "bins labels labels"]) -> list[float]:
    """The mIoU at each threshold, from pixels by (bin, predicted label, true label)."""
    total = by_bin.sum((0, 1))
    scores = []
    # The bins above j hold the pixels whose probability reaches threshold j.
    for reached in by_bin[::-1].cumsum(0)[::-1][1:]:
        predicted = reached.copy()
        predicted[0] += total - reached.sum(0)
        scores.append(ConfusionMatrix(predicted.T).miou())
    return scores


def calibrated(
    segmenter: Segmenter, tune: Benchmark, protocol: Protocol, batch_size: int
) -> tuple[Protocol, float]:
    """The protocol with scales and threshold chosen on a tune split, and the mIoU (percent) there.

    Never pass the split that is reported. A protocol with one group per pixel, or one that refines,
    keeps its scale and threshold, and is only measured.
    """
    plain = protocol.averaged == "probabilities" and not (protocol.pamr_steps or protocol.min_area)
    if protocol.grouping == "one_group" or not plain:
        result = evaluate(segmenter, tune, protocol, batch_size=batch_size)
        return protocol, result["miou"]
    # Without a threshold no everyday words would compete, as they will once there is one.
    protocol = protocol.replace(threshold=protocol.threshold or 0.0)
    word_to_class = words_of(tune, protocol)[0].word_to_class
    pairs = scored_benchmark(segmenter, tune, protocol, batch_size=batch_size)
    best = calibrate(pairs, protocol, word_to_class=word_to_class)
    chosen = protocol.replace(
        scale=best.scale,
        image_scale=best.image_scale,
        threshold=best.threshold,
        competing_words=len(word_to_class),
    )
    return chosen, 100.0 * best.miou


def swept(
    segmenter: Segmenter,
    train: Benchmark,
    protocol: Protocol,
    *,
    part: tuple[int, int],
    gather: Gather,
    batch_size: int,
) -> tuple[Protocol, dict[str, Any]]:
    """The protocol with the best threshold by mIoU, and facts about the sweep for the result.

    The protocol's own threshold stays where none of `SWEPT_THRESHOLDS` is better. The images are
    encoded once and labeled with every threshold, so any protocol can be swept.

    Args:
      train: images that are not reported.
      protocol: for this benchmark.
      part, gather, batch_size: see `evaluate.evaluate`.

    Raises:
      UserError: every pixel of the images is ignored.
    """
    vocabulary, _ = words_of(train, protocol)
    ready = with_scale(protocol, segmenter)
    labels, present = len(vocabulary.classes) + 1, protocol.threshold
    thresholds = sorted({*SWEPT_THRESHOLDS, *([] if present is None else [present])})
    counts = [ConfusionMatrix.empty(labels) for _ in thresholds]
    scored = scored_benchmark(segmenter, train, ready, batch_size=batch_size, part=part)
    for scored_image, truth in scored:
        for matrix, threshold in zip(counts, thresholds, strict=True):
            at = ready.replace(threshold=threshold)
            ((_, predicted),) = label_maps([scored_image], at, vocabulary.word_to_class)
            matrix.update(predicted, truth)
    packed = np.concatenate([matrix.counts.ravel() for matrix in counts])
    summed = gather(packed).sum(0).reshape(len(thresholds), labels, labels)
    scores = [ConfusionMatrix(matrix).miou() for matrix in summed]
    if np.isnan(scores).all():
        raise UserError(
            f"benchmark {train.name}: no pixel of the {len(train)} training images counts, so no "
            "threshold can be chosen on them: take more with --sweep"
        )
    best = thresholds[int(np.nanargmax(scores))]
    if present is not None and scores[thresholds.index(present)] == np.nanmax(scores):
        best = present
    facts = {
        "threshold_sweep": {
            "images": len(train),
            "data": train.describe(),
            "thresholds": thresholds,
            "miou": [round(100 * score, 4) for score in scores],
        }
    }
    return protocol.replace(threshold=best), facts


# ---- images to choose on


def tune_split(name: str, config: ConfigDict) -> Benchmark | None:
    """`config.tune_count` images to calibrate on, none of which is reported.

    None where the config does not ask to calibrate, or the benchmark has no such images.

    Raises:
      UserError: files are missing, or the images would be reported.
    """
    if not config.calibrate:
        return None
    if name != "scenes":
        folder = FOLDERS.get(name)
        if folder is None or folder.drop_background or not class_table(folder.base).background:
            return None
    if config.tune_count < 1:
        raise UserError(f"config.eval.tune_count is {config.tune_count}; it must be at least 1")
    return train_split(name, config, config.tune_count)


def train_split(name: str, config: ConfigDict, count: int) -> Benchmark:
    """`count` images to choose a threshold on, none of which is reported.

    Raises:
      UserError: the benchmark has no such images.
    """
    reported = benchmark_of(name, config)
    if name == "scenes":
        if reported.split == "tune":
            raise UserError(
                "benchmark scenes: its tune split is to be reported, so no scale or threshold can "
                "be chosen on it: set config.eval.scenes.split to another one"
            )
        return benchmark_of(name, config, split="tune", count=count)
    if name not in FOLDERS:
        raise UserError(
            f"benchmark {name} has no training split to choose a threshold on; set "
            "--config.eval.protocol.threshold, or leave out --sweep"
        )
    tune = benchmark_of(name, config, split="train", count=0)
    if shared := set(tune.keys) & set(reported.keys):
        raise UserError(
            f"benchmark {name}: {len(shared)} images are in the lists of both its training and its "
            f"validation split, {min(shared)} among them: no threshold can be chosen on images "
            "that are reported"
        )
    # Evenly over the split, whose order follows years or scenes.
    return dataclasses.replace(tune, every=max(1, len(tune) // count), count=count)
