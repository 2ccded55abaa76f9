"""Labels of images with many more pixels than they were segmented at, without scoring each pixel.

A score of the original image is bilinear between four pixels of the segmented one, a mean of their
scores with the same four weights for every word. So a word that is best at all four corners of such
a block is best everywhere inside, and where it is above the threshold at all four it is so inside;
where no word is above it at any corner, none is inside. (Under a softmax that comes after the
upsampling the second still holds, since log p is concave in the scores, but not the third.) Only
blocks whose corners disagree, those along the borders of regions, are scored pixel by pixel. The
labels are those of scoring everything, but for rounding where two scores agree to seven digits.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Integer

from ovseg_jax.segmentation import readout
from ovseg_jax.segmentation.windows import bilinear_taps
from ovseg_jax.shapes import Array, Bool, Float, Int

# It is worth it above so many pixels of the original image for each of the segmented one, and so
# many scores in all: below, the other way takes less than this one needs to be compiled.
FACTOR, FLOATS = 4, 8 << 20
# Scores that are worked on at one time along borders, few enough to stay in the caches.
BORDER_FLOATS = 4 << 20
AnyArray = Array | np.ndarray
Owners = tuple[int, ...] | None
# Rows of the segmented image, by their numbers -> their scores [rows, w, words].
ScoreRows = Callable[[Integer[np.ndarray, " rows"]], Array]


def worth_it(size: tuple[int, int], resized: tuple[int, int], words: int) -> bool:
    """Whether labels of an image of `size` pixels should be made in this way."""
    pixels = size[0] * size[1]
    return pixels > FACTOR * resized[0] * resized[1] and pixels * words > FLOATS


def magnified_labels(
    score_rows: ScoreRows,
    resized: tuple[int, int],
    size: tuple[int, int],
    *,
    words: int,
    band_floats: int,
    threshold: float | None,
    owners: Owners = None,
    late_scale: float | None = None,
    kept: Float[np.ndarray, " words"] | None = None,
) -> Int[np.ndarray, "H W"]:
    """The labels (see `readout.decide`) of an image at its original size.

    Args:
      score_rows: called with rows of the image as it was segmented, a number of them that is the
        same in every call; rows may be asked for twice.
      resized, size: (height, width) of the image as it was segmented, and as it came.
      words: how many there are. band_floats: scores of the segmented image that exist at one time.
      late_scale: where given, scores are cosines, and the softmax of their product with it comes
        after the upsampling; else they are probabilities.
      kept: factors on the probabilities of the words.
    """
    (h, w), (height, width) = resized, size
    down, across = _Axis(height, h), _Axis(width, w)
    kept = np.ones(words, np.float32) if kept is None else kept
    late = late_scale is not None
    scale = np.float32(late_scale if late else 1.0)
    band = min(h, max(1, band_floats // (w * words) - 1))
    at_once = max(1, BORDER_FLOATS // (down.longest * across.longest * words))
    labels = np.empty(size, np.int32)
    for first in range(0, h, band):
        scores = score_rows(np.minimum(np.arange(first, first + band + 1), h - 1))
        found, agreed = (
            np.asarray(x) for x in _judged(scores, threshold, kept, scale, owners=owners, late=late)
        )
        last = min(first + band, h)
        start, stop = down.starts[first], down.starts[last]
        part = labels[start:stop]
        part[:] = found[down.low[start:stop] - first][:, across.low]
        i, j = np.nonzero(~agreed[: last - first])
        for chosen in range(0, len(i), at_once):
            ii, jj = i[chosen : chosen + at_once], j[chosen : chosen + at_once]
            padding = (0, at_once - len(ii))  # one shape, so nothing is compiled again
            blocks = _bordering(
                scores,
                np.pad(ii, padding),
                np.pad(jj, padding),
                down.parts[np.pad(ii + first, padding)],
                across.parts[np.pad(jj, padding)],
                threshold,
                kept,
                scale,
                owners=owners,
                late=late,
            )
            blocks = np.asarray(blocks)[: len(ii)]
            rows, inside_rows = down.pixels(ii + first)
            columns, inside_columns = across.pixels(jj)
            inside = inside_rows[:, :, None] & inside_columns[:, None, :]
            at = np.broadcast_to(rows[:, :, None], inside.shape)[inside]
            labels[at, np.broadcast_to(columns[:, None, :], inside.shape)[inside]] = blocks[inside]
    return labels


class _Axis:
    """Which pixels lie between which cells of one axis, and where.

    Attributes:
      low: the cell before each pixel. starts: the first pixel after each cell, and the end.
      longest: most pixels between two cells.
      parts: [cells, longest] how far each pixel is on the way to the next cell, 0 to 1.
    """

    def __init__(self, pixels: int, cells: int):
        self.low, _, part = bilinear_taps(pixels, cells)
        self.starts = np.searchsorted(self.low, np.arange(cells + 1))
        self.longest = int(np.diff(self.starts).max())
        self.parts = part[np.minimum(self.pixels(np.arange(cells))[0], pixels - 1)]

    def pixels(self, cells: Integer[np.ndarray, " B"]) -> tuple[np.ndarray, np.ndarray]:
        """The pixels [B, longest] after each cell, and which of those are before the next one."""
        numbers = self.starts[cells][:, None] + np.arange(self.longest)
        return numbers, numbers < self.starts[cells + 1][:, None]


@functools.partial(jax.jit, static_argnames=("owners", "late"))
def _judged(
    scores: Float[Array, "rows w words"],
    threshold: float | Float[AnyArray, ""] | None,
    kept: Float[AnyArray, " words"],
    scale: np.float32 | Float[Array, ""],
    *,
    owners: Owners,
    late: bool,
) -> tuple[Int[Array, "blocks w"], Bool[Array, "blocks w"]]:
    """The label of each block whose corners agree, and whether they do."""
    p = _probabilities(scores, kept, scale, late)
    best = jnp.argmax(p, axis=-1).astype(jnp.int32)
    words = _corners(best)
    agreed = jnp.all(words == words[:1], axis=0)
    label = readout.decide(p, threshold, owners)[:-1]
    if threshold is not None:
        above = _corners(jnp.max(p, axis=-1) >= threshold)
        agreed &= jnp.all(above, axis=0)
        if not late:
            agreed |= ~jnp.any(above, axis=0)
    return label, agreed


@functools.partial(jax.jit, static_argnames=("owners", "late"))
def _bordering(
    scores: Float[Array, "rows w words"],
    i: Int[AnyArray, " B"],
    j: Int[AnyArray, " B"],
    down: Float[AnyArray, "B m"],
    across: Float[AnyArray, "B n"],
    threshold: float | Float[AnyArray, ""] | None,
    kept: Float[AnyArray, " words"],
    scale: np.float32 | Float[Array, ""],
    *,
    owners: Owners,
    late: bool,
) -> Int[Array, "B m n"]:
    """The labels of all pixels of some blocks."""
    right = jnp.minimum(j + 1, scores.shape[1] - 1)
    down, across = (jnp.asarray(x) for x in (down[:, :, None], across[:, None, :, None]))
    sides = (
        scores[i, x][:, None] * (1.0 - down) + scores[i + 1, x][:, None] * down for x in (j, right)
    )
    left, right = (side[:, :, None] for side in sides)
    mixed = left * (1.0 - across) + right * across
    return readout.decide(_probabilities(mixed, kept, scale, late), threshold, owners)


def _probabilities(
    scores: Float[Array, "... words"],
    kept: Float[AnyArray, " words"],
    scale: np.float32 | Float[Array, ""],
    late: bool,
) -> Float[Array, "... words"]:
    p = readout.probabilities(scores, scale) if late else scores
    return p * jnp.asarray(kept).reshape(*(1,) * (p.ndim - 1), -1)


def _corners(maps: Array) -> Array:
    """The values [4, rows - 1, w] at the corners of each block; the last column borders itself."""
    right = jnp.concatenate([maps[:, 1:], maps[:, -1:]], axis=1)
    return jnp.stack([maps[:-1], maps[1:], right[:-1], right[1:]])
