"""The background threshold of a benchmark, chosen on its training split."""

from typing import Any

import numpy as np

from ovseg_jax.segmentation.benchmarks import Benchmark
from ovseg_jax.segmentation.class_words import words_of
from ovseg_jax.segmentation.evaluate import scored_benchmark
from ovseg_jax.segmentation.labels import label_maps
from ovseg_jax.segmentation.metric import ConfusionMatrix
from ovseg_jax.segmentation.parts import Gather
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.segmentation.scores import Segmenter, with_scale

THRESHOLDS = tuple(i / 20 for i in range(20))


def swept(
    segmenter: Segmenter,
    train: Benchmark,
    protocol: Protocol,
    *,
    part: tuple[int, int],
    gather: Gather,
    batch_size: int,
) -> tuple[Protocol, dict[str, Any]]:
    """The protocol with the best of `THRESHOLDS`, by mIoU, and what is to be said about it.

    The images are encoded once, and labeled with every threshold, so any protocol can be swept.

    Args:
      train: images that are not reported. protocol: for this benchmark.
      part, gather, batch_size: see `evaluate.evaluate`.
    """
    vocabulary, _ = words_of(train, protocol.class_names)
    ready = with_scale(protocol, segmenter)
    labels = len(vocabulary.classes) + 1
    counts = [ConfusionMatrix.empty(labels) for _ in THRESHOLDS]
    scored = scored_benchmark(segmenter, train, ready, batch_size=batch_size, part=part)
    for one, truth in scored:
        for matrix, threshold in zip(counts, THRESHOLDS, strict=True):
            at = ready.replace(threshold=threshold)
            ((_, found),) = label_maps([one], at, vocabulary.owners)
            matrix.update(found, truth)
    packed = np.concatenate([matrix.counts.ravel() for matrix in counts])
    summed = gather(packed).sum(0).reshape(len(THRESHOLDS), labels, labels)
    scores = [ConfusionMatrix(matrix).miou() for matrix in summed]
    best = int(np.nanargmax(scores))
    said = {
        "threshold_sweep": {
            "images": len(train),
            "data": train.describe(),
            "thresholds": list(THRESHOLDS),
            "miou": [round(100 * score, 4) for score in scores],
        }
    }
    return protocol.replace(threshold=THRESHOLDS[best]), said
