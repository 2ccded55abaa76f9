"""Scales and background threshold of a protocol, chosen on images that are not reported: all of
them for a model that was just trained (`calibrated`), or only the threshold (`swept`)."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Integer
from ml_collections import ConfigDict

from ovseg_jax.data.benchmarks import class_table
from ovseg_jax.data.benchmarks.class_tables import IGNORE
from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.benchmarks import Benchmark, benchmark_of, words_of
from ovseg_jax.segmentation.evaluate import (
    Gather,
    count_pixels,
    evaluate,
    mean_iou,
    scored_benchmark,
)
from ovseg_jax.segmentation.labels import WordToClass, best_words, label_maps, runs_of_equal_shape
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


def calibrate(
    scored: Iterable[ImageScores],
    protocol: Protocol,
    scales: Sequence[float] = SCALES,
    image_scales: Sequence[float] = IMAGE_SCALES,
    thresholds: Sequence[float] = THRESHOLDS,
    batch_size: int = 16,
    word_to_class: WordToClass = None,
) -> tuple[Protocol, Float[np.ndarray, "pairs thresholds"]]:
    """The protocol with the scales and the threshold of the highest mIoU, background included, and
    the mIoU (0..1) of all that were tried, thresholds in rising order.

    For one pair of scales, the labels at every threshold follow from the best class of each pixel
    and its probability. So pixels are counted once by (probability bin, best class, truth), and
    sums over bins are the confusion matrices of all thresholds.

    Args:
      scored: scores with true labels (0 background, 1 + class, 255 ignored).
      batch_size, word_to_class: as `group` and `word_to_class` of `label_maps`.
    """
    edges = np.asarray(thresholds, np.float32)
    pairs = list(itertools.product(map(float, scales), map(float, image_scales)))
    counts = None
    for same in runs_of_equal_shape(scored, batch_size):
        if counts is None:
            words = same[0].group_cosines.shape[-1]
            classes = np.arange(words) if word_to_class is None else np.asarray(word_to_class)
            labels = int(classes.max()) + 2
            counts = np.zeros((len(pairs), len(edges) + 1, labels, labels), np.int64)
        truth = np.stack([scored_image.truth for scored_image in same])
        valid = truth != IGNORE
        truth = truth[valid].astype(np.int64)
        if truth.size and truth.max() >= labels:
            raise UserError(f"true label {truth.max()}, but there are {labels - 1} classes")
        for i, (scale, image_scale) in enumerate(pairs):
            tried = protocol.replace(scale=scale, image_scale=image_scale)
            highest, best = _pixels(same, tried, batch_size)
            # A pixel in bin j has its class at the thresholds 0..j-1.
            bins = np.searchsorted(edges, highest[valid], side="right")
            joint = (bins * labels + classes[best[valid]] + 1) * labels + truth
            counts[i] += np.bincount(joint, minlength=counts[i].size).reshape(counts[i].shape)
    if counts is None:
        raise UserError("calibration needs at least one image")
    curves = np.array([_miou_of_thresholds(by_bin) for by_bin in counts])
    if np.isnan(curves).all():
        raise UserError("calibration saw no pixel that is not ignored")
    i, j = np.unravel_index(np.nanargmax(curves), curves.shape)
    scale, image_scale = pairs[i]
    best = {"scale": scale, "image_scale": image_scale, "threshold": float(thresholds[j])}
    return protocol.replace(**best), curves


def _pixels(same, protocol, group) -> tuple[np.ndarray, np.ndarray]:
    """Highest probability (infinite where a capped threshold is reached) and its word at each pixel
    [B, H, W]."""
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
        scores.append(mean_iou(predicted.T))
    return scores


def calibrated(
    segmenter: Segmenter, tune: Benchmark, protocol: Protocol, batch_size: int
) -> tuple[Protocol, float]:
    """The protocol with scales and threshold chosen on a tune split (never the one that is
    reported), and the mIoU in percent there. Published protocols with one group per pixel, or that
    refine, are only measured."""
    plain = protocol.averaged == "probabilities" and not (protocol.pamr_steps or protocol.min_area)
    if protocol.grouping == "one_group" or not plain:
        return protocol, evaluate(segmenter, tune, protocol, batch_size=batch_size)["miou"]
    # Without a threshold no everyday words would compete, as they will once there is one.
    protocol = protocol.replace(threshold=protocol.threshold or 0.0)
    word_to_class = words_of(tune, protocol)[0].word_to_class
    pairs = scored_benchmark(segmenter, tune, protocol, batch_size)
    best, curves = calibrate(pairs, protocol, word_to_class=word_to_class)
    miou = 100.0 * float(np.nanmax(curves))
    return best.replace(competing_words=len(word_to_class)), miou


def swept(
    segmenter: Segmenter,
    train: Benchmark,
    protocol: Protocol,
    *,
    part: tuple[int, int],
    gather: Gather,
    batch_size: int,
) -> tuple[Protocol, dict[str, Any]]:
    """The protocol (of a benchmark) with the best threshold by mIoU, and facts for the result.

    The protocol's own threshold stays where none of `SWEPT_THRESHOLDS` is better. The images (none
    that is reported) are encoded once and labeled with every threshold, so any protocol can be
    swept. For the options see `evaluate.evaluate`.
    """
    vocabulary, _ = words_of(train, protocol)
    ready, labels = with_scale(protocol, segmenter), len(vocabulary.classes) + 1
    thresholds = sorted({*SWEPT_THRESHOLDS, protocol.threshold} - {None})
    counts = np.zeros((len(thresholds), labels, labels), np.int64)
    numbers = range(part[0], len(train), part[1])
    for scored_image in scored_benchmark(segmenter, train, ready, batch_size, numbers):
        for confusion, threshold in zip(counts, thresholds, strict=True):
            at = ready.replace(threshold=threshold)
            ((_, predicted),) = label_maps([scored_image], at, vocabulary.word_to_class)
            confusion += count_pixels(predicted, scored_image.truth, labels)
    summed = gather(counts.ravel()).sum(0).reshape(counts.shape)
    scores = [mean_iou(confusion) for confusion in summed]
    if np.isnan(scores).all():
        where = f"benchmark {train.name}: no pixel of the {len(train)} training images"
        raise UserError(f"{where} counts: take more with --sweep")
    reached = [t for t, score in zip(thresholds, scores, strict=True) if score == np.nanmax(scores)]
    best = protocol.threshold if protocol.threshold in reached else reached[0]
    facts = {
        "images": len(train),
        "data": train.describe(),
        "thresholds": thresholds,
        "miou": [round(100 * score, 4) for score in scores],
    }
    return protocol.replace(threshold=best), {"threshold_sweep": facts}


# ---- images to choose on


def tune_split(name: str, config: ConfigDict) -> Benchmark | None:
    """`config.tune_count` images to calibrate on, none of which is reported; None where the config
    does not ask to calibrate, or the benchmark has no such images."""
    # Without a background there is no threshold to choose.
    folder = FOLDERS.get(name)
    dropped = folder is None or folder.drop_background or folder.only_unseen
    suits = name == "scenes" or (not dropped and class_table(folder.base).background)
    if not config.calibrate or not suits:
        return None
    if config.tune_count < 1:
        raise UserError(f"config.eval.tune_count is {config.tune_count}; it must be at least 1")
    return train_split(name, config, config.tune_count)


def train_split(name: str, config: ConfigDict, count: int) -> Benchmark:
    """`count` images to choose a threshold on; UserError where they would be reported."""
    reported = benchmark_of(name, config)
    if name == "scenes":
        if reported.split == "tune":
            raise UserError(
                "benchmark scenes: its tune split is to be reported, so no threshold can be chosen "
                "on it: set config.eval.scenes.split to another one"
            )
        return benchmark_of(name, config, split="tune", count=count)
    if name not in FOLDERS:
        raise UserError(f"benchmark {name} has no training split for --sweep: leave it out")
    tune = benchmark_of(name, config, split="train", count=0)
    if shared := set(tune.keys) & set(reported.keys):
        raise UserError(
            f"benchmark {name}: {len(shared)} images are in the lists of both its training and its "
            f"validation split, such as {min(shared)}, and would be reported"
        )
    # Evenly over the split, whose order follows years or scenes.
    every = max(1, len(tune) // count)
    return benchmark_of(name, config, split="train", every=every, count=count)
