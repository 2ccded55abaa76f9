"""Label maps at the size of the images, from the scores of their windows.

A protocol may refine score maps by the image's own colors (`pamr`).
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Integer

from ovseg_jax.errors import UserError
from ovseg_jax.segmentation import readout
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.segmentation.scores import ImageScores
from ovseg_jax.shapes import Array, Float, UInt8

# Class probabilities that exist at once, in floats; larger images are labeled in bands of rows.
BAND_FLOATS = 32 << 20
WordToClass = tuple[int, ...] | None


def label_maps(
    scores: Iterable[ImageScores],
    protocol: Protocol,
    word_to_class: WordToClass = None,
    group: int = 16,
) -> Iterator[tuple[ImageScores, Integer[np.ndarray, "H W"]]]:
    """Each image's scores with its labels at its original size, see `readout.decide`.

    Args:
      word_to_class: the class of each word that was scored, -1 for background; by default every
        word is a class.
      group: consecutive images of equal size that are labeled in one call.
    """
    for same in runs_of_equal_shape(scores, 1 if protocol.pamr_steps else group):
        yield from zip(same, _labels_of(same, protocol, word_to_class, group), strict=True)


def runs_of_equal_shape(scores: Iterable[ImageScores], most: int) -> Iterator[list[ImageScores]]:
    """Consecutive scores of equal shapes, at most `most` in a list."""
    for _, run in itertools.groupby(scores, lambda scored_image: scored_image.shapes):
        while same := list(itertools.islice(run, most)):
            yield same


def _labels_of(same, protocol, word_to_class, group) -> Integer[np.ndarray, "B H W"]:
    words = same[0].group_cosines.shape[-1]
    threshold = protocol.threshold_for(words)
    classes = np.arange(words) if word_to_class is None else np.asarray(word_to_class)
    if threshold is None and classes.min() < 0:
        raise UserError("words for the background need a background that they can be painted as")
    if protocol.grouping == "one_group":
        return np.stack([_one_group_labels(x, protocol, threshold, classes) for x in same])
    highest, best = best_words(same, protocol, group)
    if protocol.min_area:
        # Words of classes that win enough pixels, whatever the threshold, and of the background.
        kept = np.ones((len(same), words), np.float32)
        for row, won in zip(kept, classes[best], strict=True):
            areas = np.bincount(won[won >= 0], minlength=classes.max() + 1)
            row[:] = (classes < 0) | (areas > protocol.min_area * areas.sum())[classes]
        highest, best = best_words(same, protocol, group, kept)
    if threshold is not None and protocol.cap_threshold:
        threshold = np.minimum(np.float32(threshold), highest.max(axis=(1, 2), keepdims=True))
    labels = readout.decide(highest, best, threshold, classes)
    if protocol.order == "argmax_first":
        labels = _spread_votes(labels, *same[0].weights(nearest=True), group)
    return labels


def best_words(
    same: Sequence[ImageScores],
    protocol: Protocol,
    group: int,
    kept: Float[np.ndarray, "B words"] | None = None,
) -> tuple[Float[np.ndarray, "B H W"], Integer[np.ndarray, "B H W"]]:
    """The highest probability at each pixel (each cell, with 'argmax_first'), and its word, of
    images of equal shapes, a single one where the protocol refines.

    Several images are padded to `group`, so that the program is compiled once. `kept` is 1 for
    words that may win; by default all may.
    """
    count, late = len(same), protocol.averaged == "cosines"
    maps = _cell_maps(same, protocol, group)
    rows, columns = same[0].weights()
    if protocol.pamr_steps:
        # At the size of the resized image, refined by its colors.
        maps = _spread(maps, *same[0].weights(same[0].resized))[0]
        maps = pamr(maps, same[0].image, steps=protocol.pamr_steps)[None]
        rows, columns = map(readout.bilinear_weights, same[0].size, same[0].resized)
    kept = None if kept is None else _padded(kept, group)
    if protocol.order == "argmax_first":
        highest, best = (np.asarray(x) for x in _best(maps, None, None, kept, protocol.scale, late))
        return highest[:count], best[:count]
    highest = np.empty((count, len(rows), len(columns)), np.float32)
    best = np.empty(highest.shape, np.int32)
    for where, band in _bands(rows, maps.shape[0] * len(columns) * (maps.shape[-1] + 1)):
        results = _best(maps, band, columns, kept, protocol.scale, late)
        for whole, result in zip((highest, best), results, strict=True):
            whole[:, where] = np.asarray(result)[:count, : where.stop - where.start]
    return highest, best


def _padded(x: np.ndarray, group: int) -> np.ndarray:
    """The array with zeros for the images that are missing, where there are several."""
    missing = group - len(x) if len(x) > 1 else 0
    return np.pad(x, ((0, missing), *[(0, 0)] * (x.ndim - 1)))


def _bands(rows: np.ndarray, floats_of_a_row: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Bands of rows of equal height, the last padded with zeros, and which rows they are."""
    height = len(rows)
    band = -(-height // -(-height * floats_of_a_row // BAND_FLOATS))
    for start in range(0, height, band):
        part = rows[start : start + band]
        yield slice(start, start + len(part)), np.pad(part, ((0, band - len(part)), (0, 0)))


@jax.jit(static_argnames="late")
def _best(maps, rows, columns, kept, scale, late):
    """`late`: the maps are cosines, and the softmax over classes comes last."""
    p = jnp.asarray(maps) if rows is None else readout.spread(maps, rows, columns)
    p = readout.probabilities(p, scale) if late else p
    p = p if kept is None else p * jnp.asarray(kept)[:, None, None]
    return jnp.max(p, axis=-1), jnp.argmax(p, axis=-1).astype(jnp.int32)


def _cell_maps(same: Sequence[ImageScores], protocol: Protocol, group: int) -> Any:
    """Probabilities of the words in each cell of some images, or with late softmax the cosines."""
    arrays = zip(*((x.cells, *x.evidence()) for x in same), strict=True)
    cells, *evidence = (_padded(np.stack(array), group) for array in arrays)
    if protocol.averaged == "cosines":
        return cells
    return _cell_probabilities(cells, *evidence, protocol.scale, protocol.image_scale)


@jax.jit
def _cell_probabilities(cells, margins, foreground, scale, image_scale):
    p = readout.probabilities(cells, scale)
    return readout.downweight_by_image_score(p, margins, image_scale, foreground)


def _spread_votes(labels, rows, columns, group) -> Integer[np.ndarray, "B H W"]:
    """The label that most of the cells over a pixel have; each window has one cell there."""
    kinds = 1 << int(labels.max(initial=0)).bit_length()  # a power of two: few programs compile
    cells, parts = _padded(labels, group), []
    for where, band in _bands(rows, len(cells) * len(columns) * (kinds + 1)):
        part = np.asarray(_most_votes(cells, band, columns, kinds))
        parts.append(part[: len(labels), : where.stop - where.start])
    return np.concatenate(parts, axis=1)


@jax.jit(static_argnames="kinds")
def _most_votes(labels, rows, columns, kinds):
    votes = jax.nn.one_hot(labels, kinds, dtype=jnp.float32)
    return jnp.argmax(readout.spread(votes, rows, columns), axis=-1).astype(jnp.int32)


_spread = jax.jit(readout.spread)


def class_probabilities(scored_image: ImageScores, protocol: Protocol) -> np.ndarray:
    """Probabilities [..., C] of the classes: of each patch, or ('one_group') of each group of each
    window."""
    if protocol.grouping == "one_group":
        cosines = scored_image.group_cosines, scored_image.image_cosines
        return np.asarray(_group_probabilities(*cosines, protocol.scale, protocol.image_classes))
    early = protocol.replace(averaged="probabilities")
    return np.asarray(_cell_maps([scored_image], early, 1)[0])


_group_probabilities = jax.jit(readout.group_probabilities, static_argnames="kept")


def _one_group_labels(scored_image, protocol, threshold, classes) -> np.ndarray:
    side, stride = protocol.window, protocol.stride
    return readout.label_image(
        scored_image.windows_of(scored_image.cells),
        class_probabilities(scored_image, protocol),
        window=tuple(min(side, length) for length in scored_image.resized),
        corners=tuple(readout.window_grid(*scored_image.resized, side, stride)),
        resized=scored_image.resized,
        size=scored_image.size,
        threshold=threshold,
        cap=protocol.cap_threshold,
        classes=classes,
        band_floats=BAND_FLOATS,
    )


# ---- pixel-adaptive mask refinement

_AROUND = tuple((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0))
DILATIONS = (1, 2, 4, 8, 12, 24)  # pixels, those of TCL
# Floats of the maps that are refined at one time; a multiple of 16 classes suits vector units.
FLOATS, VECTOR = 16 << 20, 16


def pamr(
    maps: Float[Array | np.ndarray, "H W C"],
    image: UInt8[Array | np.ndarray, "H W 3"],
    *,
    steps: int,
) -> Float[Array, "H W C"]:
    """PAMR of Araslanov and Roth, *Single-Stage Semantic Segmentation from Image Labels*, CVPR
    2020, Sec. 3.3: the score of a pixel becomes a mean over its neighbors, `steps` times.

    A pixel's neighbors are the eight around it at each of the distances `DILATIONS`, the border
    repeated outside. Their weights are

        softmax over neighbors of  -mean over channels of |x_i - x_n| / (0.1 sigma_i + 1e-8)

    where sigma_i is the (unbiased) standard deviation of each channel over the pixel and its
    neighbors, the pixel once for each distance.
    """
    maps, weights = jnp.asarray(maps), _weights(image)
    h, w, count = maps.shape
    most = max(1, FLOATS // (h * w * VECTOR)) * VECTOR
    parts = (maps[..., first : first + most] for first in range(0, count, most))
    return jnp.concatenate([_smoothed(part, weights, steps=steps) for part in parts], axis=-1)


@jax.jit
def _weights(image: UInt8[Array | np.ndarray, "H W 3"]) -> Float[Array, "neighbors H W"]:
    # Differences are divided by their own spread, so the range of the colors does not matter.
    colors, many = jnp.asarray(image).astype(jnp.float32) / 255.0, len(DILATIONS)
    mean = (sum(_shifted(colors)) + many * colors) / (9.0 * many)
    squares = sum(jnp.square(x - mean) for x in _shifted(colors))
    squares = squares + many * jnp.square(colors - mean)
    unit = 0.1 * jnp.sqrt(squares / (9.0 * many - 1.0)) + 1e-8
    near = [-jnp.mean(jnp.abs(x - colors) / unit, axis=-1) for x in _shifted(colors)]
    return jax.nn.softmax(jnp.stack(near), axis=0)


@jax.jit(static_argnames="steps")
def _smoothed(maps, weights, steps):
    def smooth(step: Array, current: Array) -> Array:
        neighbors = zip(weights[..., None], _shifted(current), strict=True)
        return sum(weight * shifted for weight, shifted in neighbors)

    return jax.lax.fori_loop(0, steps, smooth, maps)


def _shifted(x: Array) -> Iterator[Array]:
    """The values of each neighbor, as maps of the same size."""
    h, w = x.shape[:2]
    for far in DILATIONS:
        padded = jnp.pad(x, ((far, far), (far, far), (0, 0)), mode="edge")
        for down, right in _AROUND:
            top, left = far * (1 + down), far * (1 + right)
            yield padded[top : top + h, left : left + w]
