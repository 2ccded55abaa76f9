"""The background threshold of a benchmark, chosen on its training split."""

from typing import Any

import numpy as np

from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.benchmarks import Benchmark
from ovseg_jax.segmentation.class_words import words_of
from ovseg_jax.segmentation.evaluate import scored_benchmark
from ovseg_jax.segmentation.labels import label_maps
from ovseg_jax.segmentation.metric import ConfusionMatrix
from ovseg_jax.segmentation.parts import Gather
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.segmentation.scores import Segmenter, with_scale

# Close to each other below 0.1, where the best ones of a softmax over many classes lie.
THRESHOLDS = (
    *(i / 100 for i in range(10)),
    *(i / 40 for i in range(4, 12)),
    *(i / 20 for i in range(6, 20)),
)


def swept(
    segmenter: Segmenter,
    train: Benchmark,
    protocol: Protocol,
    *,
    part: tuple[int, int],
    gather: Gather,
    batch_size: int,
) -> tuple[Protocol, dict[str, Any]]:
    """The protocol with the best threshold by mIoU, and what is to be said about it.

    The candidates are `THRESHOLDS` and the protocol's own, which stays where none is better. The
    images are encoded once, and labeled with every threshold, so any protocol can be swept.

    Args:
      train: images that are not reported. protocol: for this benchmark.
      part, gather, batch_size: see `evaluate.evaluate`.

    Raises:
      UserError: every pixel of the images is ignored.
    """
    vocabulary, _ = words_of(train, protocol)
    ready = with_scale(protocol, segmenter)
    labels, own = len(vocabulary.classes) + 1, protocol.threshold
    thresholds = sorted({*THRESHOLDS, *([] if own is None else [own])})
    counts = [ConfusionMatrix.empty(labels) for _ in thresholds]
    scored = scored_benchmark(segmenter, train, ready, batch_size=batch_size, part=part)
    for one, truth in scored:
        for matrix, threshold in zip(counts, thresholds, strict=True):
            at = ready.replace(threshold=threshold)
            ((_, found),) = label_maps([one], at, vocabulary.owners)
            matrix.update(found, truth)
    packed = np.concatenate([matrix.counts.ravel() for matrix in counts])
    summed = gather(packed).sum(0).reshape(len(thresholds), labels, labels)
    scores = [ConfusionMatrix(matrix).miou() for matrix in summed]
    if np.isnan(scores).all():
        raise UserError(
            f"benchmark {train.name}: no pixel of the {len(train)} training images counts, so no "
            "threshold can be chosen on them: take more with --sweep"
        )
    best = thresholds[int(np.nanargmax(scores))]
    if own is not None and scores[thresholds.index(own)] == np.nanmax(scores):
        best = own
    said = {
        "threshold_sweep": {
            "images": len(train),
            "data": train.describe(),
            "thresholds": thresholds,
            "miou": [round(100 * score, 4) for score in scores],
        }
    }
    return protocol.replace(threshold=best), said
