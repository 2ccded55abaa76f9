"""Label maps at the size of the images, from the scores of their windows."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Integer

from ovseg_jax.segmentation import one_group, readout, windows
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.segmentation.refine import pamr
from ovseg_jax.segmentation.scores import ImageScores
from ovseg_jax.shapes import Float

# Floats of class probability per pixel that exist at one time; more pixels are done in bands.
BAND_FLOATS = 32 << 20
Owners = tuple[int, ...] | None


def label_maps(
    scores: Iterable[ImageScores],
    protocol: Protocol,
    owners: Owners = None,
    group: int = 16,
) -> Iterator[tuple[ImageScores, Integer[np.ndarray, "H W"]]]:
    """Each image's scores with its labels at its original size.

    Labels are 0 for background and 1 + class, or the class itself where `protocol.threshold` is
    None (see `readout.decide`).

    Args:
      owners: the class of each word that was scored, -1 for background; by default every word is a
        class.
      group: consecutive images of equal size that are labeled in one call.
    """
    same: list[ImageScores] = []
    for one in scores:
        if same and (len(same) == group or one.shapes != same[0].shapes or protocol.refined):
            yield from zip(same, _labels_of(same, protocol, owners, group), strict=True)
            same = []
        same.append(one)
    if same:
        yield from zip(same, _labels_of(same, protocol, owners, group), strict=True)


def _labels_of(
    same: Sequence[ImageScores], protocol: Protocol, owners: Owners, group: int
) -> Integer[np.ndarray, "B H W"]:
    words = same[0].group_cosines.shape[-1]
    protocol = protocol.replace(threshold=protocol.threshold_for(words))
    if protocol.grouping == "one_group":
        return np.stack([_one_group_labels(one, protocol, owners) for one in same])
    label = _prepared(same, protocol, owners, group)
    if not protocol.min_area:
        return label(protocol.threshold, None)
    # The rule counts pixels of the best class, before the threshold.
    everywhere = label(None if protocol.threshold is None else 0.0, None)
    kept = [_large_words(labels, protocol, owners, words) for labels in everywhere]
    return label(protocol.threshold, np.stack(kept))


def _large_words(
    labels: Integer[np.ndarray, "H W"], protocol: Protocol, owners: Owners, words: int
) -> Float[np.ndarray, " words"]:
    """1 for each word of a class that is found on enough pixels, and of the background."""
    classes = np.arange(words) if owners is None else np.asarray(owners)
    first = int(protocol.threshold is not None)
    areas = np.bincount(labels.ravel(), minlength=classes.max() + 1 + first)[first:]
    large = areas > protocol.min_area * areas.sum()
    return np.where(classes < 0, True, large[classes]).astype(np.float32)


def _prepared(same: Sequence[ImageScores], protocol: Protocol, owners: Owners, group: int) -> Any:
    """(threshold, kept words [B, W] or None) -> labels [B, H, W], in bands of rows."""
    if protocol.refined:
        maps, margins, foreground = _refined(same[0], protocol)
        height, width = same[0].size
        rows = windows.bilinear_weights(height, maps.shape[1])
        columns = windows.bilinear_weights(width, maps.shape[2])
    else:
        maps = np.stack([one.cells for one in same])
        margins = np.stack([one.image_margins() for one in same])
        foreground = np.stack([one.foreground_or_zero() for one in same])
        rows, columns = same[0].weights(nearest=protocol.order == "argmax_first")
    count = len(same)
    padding = ((0, group - count if count > 1 else 0), (0, 0), (0, 0), (0, 0))
    if count > 1:  # one shape for any number of images, so nothing is compiled again
        maps, margins, foreground = (np.pad(x, padding) for x in (maps, margins, foreground))
    height, floats = len(rows), maps.shape[0] * len(columns) * (maps.shape[-1] + 1)
    band = -(-height // -(-height * floats // BAND_FLOATS))
    rows = np.pad(rows, ((0, band * -(-height // band) - height), (0, 0)))
    bands = [rows[start : start + band] for start in range(0, height, band)]
    options = {
        "scale": protocol.scale,
        "image_scale": protocol.image_scale,
        "order": protocol.order,
        "averaged": "done" if protocol.refined and not _late(protocol) else protocol.averaged,
    }
    band_of = functools.partial(_label_band, owners=owners, **options)
    best_of = functools.partial(_highest, **options)

    def label(threshold: float | None, kept: Any) -> Integer[np.ndarray, "B H W"]:
        if kept is not None:
            kept = np.pad(kept, padding[:2])
        if threshold is not None and protocol.cap_threshold:
            highest = [best_of(maps, margins, foreground, part, columns, kept) for part in bands]
            # A little lower: two programs may round one probability in two ways.
            highest = np.max(highest, axis=0) * np.float32(1 - 1e-6)
            threshold = np.minimum(highest, np.float32(threshold))
        labels = np.empty((count, height, len(columns)), np.int32)
        for start, part in zip(range(0, height, band), bands, strict=True):
            part = band_of(maps, margins, foreground, part, columns, threshold, kept)
            labels[:, start : start + band] = np.asarray(part)[:count, : height - start]
        return labels

    return label


def _base(one: ImageScores, protocol: Protocol) -> tuple[int, int]:
    """(height, width) at which the image was segmented, before any other scales."""
    return windows.resized_shape(*one.size, protocol.short_side, protocol.long_limit)


def _held_of(one: ImageScores, margins: np.ndarray, protocol: Protocol) -> Any:
    foreground = one.foreground_or_zero()
    return _held(one.cells, margins, foreground, protocol.scale, protocol.image_scale)


@jax.jit
def _held(cells, margins, foreground, scale, image_scale):
    p = readout.probabilities(cells, scale)
    return readout.held_to_image(p, margins, image_scale, foreground)


def _late(protocol: Protocol) -> bool:
    """Whether the softmax over classes comes last."""
    return protocol.averaged == "cosines"


def _refined(one: ImageScores, protocol: Protocol) -> tuple[Any, Any, Any]:
    """Scores [1, h, w, W] at the protocol's size: the mean over the image's views, then refined by
    its colors. Also zeros for the margins and the foreground: they are in the scores."""
    total, base, margins = None, _base(one, protocol), one.image_margins()
    for view in (one, *one.more):
        rows, columns = view.weights(base)
        part = _view_map(
            view.cells,
            margins,
            view.foreground_or_zero(),
            rows,
            columns,
            protocol.scale,
            protocol.image_scale,
            late=_late(protocol),
        )
        total = part if total is None else total + part
    maps = total / np.float32(len(one.more) + 1)
    if protocol.pamr_steps:
        dilations = tuple(protocol.pamr_dilations)
        maps = pamr(maps, one.image, steps=protocol.pamr_steps, dilations=dilations)
    zero = np.zeros((1, 1, 1, 1), np.float32)
    return maps[None], zero, zero


@jax.jit(static_argnames=("late",))
def _view_map(cells, margins, foreground, rows, columns, scale, image_scale, late):
    maps = jnp.asarray(cells)
    if not late:
        maps = _held(maps, margins, foreground, scale, image_scale)
    return readout.spread(maps[None], rows, columns)[0]


def _one_group_labels(
    one: ImageScores, protocol: Protocol, owners: Owners
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
        owners=owners,
        band_floats=BAND_FLOATS,
    )


def class_probabilities(one: ImageScores, protocol: Protocol) -> Float[np.ndarray, "... C"]:
    """Probabilities of the classes: of each patch, or (grouping 'one_group') of each group of each
    window."""
    if protocol.grouping == "one_group":
        cosines = one.group_cosines, one.image_cosines
        p = _group_probabilities(*cosines, protocol.scale, protocol.image_classes)
    else:
        p = _held_of(one, one.image_margins(), protocol)
    return np.asarray(p)


_group_probabilities = jax.jit(one_group.group_probabilities, static_argnames="image_classes")


@jax.jit(static_argnames=("order", "owners", "averaged"))
def _label_band(
    maps,
    margins,
    foreground,
    rows,
    columns,
    threshold,
    kept,
    scale,
    image_scale,
    order,
    owners,
    averaged,
):
    p = _band_scores(maps, margins, foreground, scale, image_scale, averaged)
    if order == "argmax_first":
        p = readout.before_spread(p, threshold, order, owners)
    p = _finished(readout.spread(p, rows, columns), kept, scale, averaged)
    return readout.after_spread(p, threshold, order, owners)


@jax.jit(static_argnames=("order", "averaged"))
def _highest(maps, margins, foreground, rows, columns, kept, scale, image_scale, order, averaged):
    """The highest probability [B, 1, 1] of what a threshold is compared with: the pixels of a band,
    or with 'argmax_first' all cells."""
    p = _band_scores(maps, margins, foreground, scale, image_scale, averaged)
    if order == "upsample_first":
        p = _finished(readout.spread(p, rows, columns), kept, scale, averaged)
    return jnp.max(p, axis=(1, 2, 3))[:, None, None]


def _band_scores(maps, margins, foreground, scale, image_scale, averaged):
    """What is carried from cells to pixels: probabilities, or cosines where the softmax is last."""
    if averaged == "probabilities":
        return _held(maps, margins, foreground, scale, image_scale)
    return jnp.asarray(maps)


def _finished(p, kept, scale, averaged):
    """Probabilities of pixels, those of words that are not `kept` 0."""
    if averaged == "cosines":
        p = readout.probabilities(p, scale)
    return p if kept is None else p * jnp.asarray(kept)[:, None, None]
