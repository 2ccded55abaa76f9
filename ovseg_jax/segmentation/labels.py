"""Label maps at the size of the images, from the scores of their windows."""

import functools
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Integer

from ovseg_jax.segmentation import one_group, readout, windows
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.segmentation.scores import ImageScores
from ovseg_jax.shapes import Float

# Floats of class probability per pixel that exist at one time; more pixels are done in bands.
BAND_FLOATS = 32 << 20


def label_maps(
    scores: Iterable[ImageScores],
    protocol: Protocol,
    classes: int | None = None,
    group: int = 16,
) -> Iterator[tuple[ImageScores, Integer[np.ndarray, "H W"]]]:
    """Each image's scores with its labels at its original size.

    Labels are 0 for background and 1 + class, or the class itself where `protocol.threshold` is
    None (see `readout.decide`).

    Args:
      classes: number of real classes, all that were scored by default; the others are distractors.
      group: consecutive images of equal size that are labeled in one call.
    """
    same: list[ImageScores] = []
    for one in scores:
        if same and (len(same) == group or one.shapes != same[0].shapes):
            yield from zip(same, _labels_of(same, protocol, classes, group), strict=True)
            same = []
        same.append(one)
    if same:
        yield from zip(same, _labels_of(same, protocol, classes, group), strict=True)


def _labels_of(
    same: Sequence[ImageScores], protocol: Protocol, classes: int | None, group: int
) -> Integer[np.ndarray, "B H W"]:
    if protocol.grouping == "one_group":
        return np.stack([_one_group_labels(one, protocol, classes) for one in same])
    cells = np.stack([one.cells for one in same])
    margins = np.stack([one.image_margins() for one in same])
    if len(same) > 1:  # one shape for any number of images, so nothing is compiled again
        padding = ((0, group - len(same)), (0, 0), (0, 0), (0, 0))
        cells, margins = np.pad(cells, padding), np.pad(margins, padding)
    rows, columns = same[0].weights(nearest=protocol.order == "argmax_first")
    label = functools.partial(
        _label_band,
        threshold=protocol.threshold,
        scale=protocol.scale,
        image_scale=protocol.image_scale,
        order=protocol.order,
        classes=classes,
    )
    height = len(rows)
    floats = cells.shape[0] * len(columns) * (cells.shape[-1] + 1)
    bands = -(-height * floats // BAND_FLOATS)
    band = -(-height // bands)
    rows = np.pad(rows, ((0, band * -(-height // band) - height), (0, 0)))
    parts = [label(cells, margins, rows[i : i + band], columns) for i in range(0, height, band)]
    return np.concatenate(parts, 1)[: len(same), :height]


def _one_group_labels(
    one: ImageScores, protocol: Protocol, classes: int | None
) -> Integer[np.ndarray, "H W"]:
    side, stride = protocol.window, protocol.stride
    return one_group.label_image(
        one.by_window(),
        class_probabilities(one, protocol),
        window=tuple(min(side, length) for length in one.resized),
        corners=tuple(windows.window_grid(*one.resized, side, stride)),
        resized=one.resized,
        size=one.size,
        threshold=protocol.threshold,
        cap=protocol.cap_threshold,
        classes=classes,
        band_floats=BAND_FLOATS,
    )


def class_probabilities(one: ImageScores, protocol: Protocol) -> Float[np.ndarray, "... C"]:
    """Probabilities of the classes: of each patch, or (grouping 'one_group') of each group of each
    window."""
    if protocol.grouping == "one_group":
        cosines = one.group_cosines, one.image_cosines
        p = _group_probabilities(*cosines, protocol.scale, protocol.image_classes)
    else:
        p = readout.probabilities(one.cells, protocol.scale)
        p = readout.held_to_image(p, one.image_margins(), protocol.image_scale)
    return np.asarray(p)


_group_probabilities = jax.jit(one_group.group_probabilities, static_argnames="image_classes")


@jax.jit(static_argnames=("order", "classes"))
def _label_band(cells, margins, rows, columns, threshold, scale, image_scale, order, classes):
    p = readout.held_to_image(readout.probabilities(cells, scale), margins, image_scale)
    maps = readout.before_spread(p, threshold, order, classes)
    maps = readout.spread(maps, rows, columns)
    return readout.after_spread(maps, threshold, order, classes)
