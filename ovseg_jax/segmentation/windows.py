"""Geometry of sliding windows: sizes, positions, and the way back from cells to pixels.

All of it is separable: a window grid is the product of positions along the height and along the
width, and so is the number of windows that cover a pixel. Upsampling each window, averaging where
windows overlap and resizing the mean to the original image are therefore one linear map along each
axis, a matrix from the cells of all windows to the pixels of the original image (`cell_weights`).
Any band of rows of any image can be computed from it, whatever the size of the image.
"""

import numpy as np
from jaxtyping import Integer
from PIL import Image

from ovseg_jax.errors import UserError
from ovseg_jax.shapes import Float, UInt8

PATCH = 16  # pixels; no published model of this family has larger patches


def resized_shape(h: int, w: int, short_side: int, long_limit: int) -> tuple[int, int]:
    """Size at which an image of h x w pixels is segmented, its aspect kept.

    The factor brings the short side to `short_side` unless the long side would exceed
    `long_limit`; half pixels round up. (224 x 900 at 448, 2048 -> 448 x 1800.) A side that would
    be shorter than `least_side` is brought to that, and the aspect then not kept.
    """
    if min(h, w) < 1:
        raise UserError(f"an image of {h} x {w} pixels cannot be segmented")
    factor = min(long_limit / max(h, w), short_side / min(h, w))
    least = least_side(short_side)
    return max(least, int(h * factor + 0.5)), max(least, int(w * factor + 0.5))


def least_side(short_side: int) -> int:
    """Shortest side that is segmented, pixels: a strip narrower than a patch has no patches."""
    return min(PATCH, short_side)


def resize_image(
    image: UInt8[np.ndarray, "H W 3"], h: int, w: int, how: str = "antialiased"
) -> UInt8[np.ndarray, "h w 3"]:
    """Bilinear resize.

    Args:
      how: "antialiased" averages over the source area where it shrinks (Pillow); "four_pixels"
        uses only the four nearest pixels, bit for bit like OpenCV's linear interpolation.
    """
    if image.shape[:2] == (h, w):
        return image
    if how == "four_pixels":
        return _four_pixels(image, h, w)
    return np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR))


def _four_pixels(image: np.ndarray, h: int, w: int) -> np.ndarray:
    """Weights are multiples of 1/2048, and digits are cut in between, hence the shifts."""

    def taps(pixels: int, cells: int) -> tuple[np.ndarray, ...]:
        source = ((np.arange(pixels) + 0.5) * (cells / pixels) - 0.5).astype(np.float32)
        low = np.floor(source)
        part = source - low
        weights = (np.rint(x * np.float32(2048)).astype(np.int32) for x in (1 - part, part))
        return low.astype(int), *weights

    def clip(index: np.ndarray, cells: int) -> np.ndarray:
        return np.clip(index, 0, cells - 1)

    left, keep, add = taps(w, image.shape[1])
    outside = (left < 0) | (left >= image.shape[1] - 1)
    keep, add = np.where(outside, 2048, keep), np.where(outside, 0, add)
    full = image.astype(np.int32)
    near, far = (full[:, clip(left + i, image.shape[1])] for i in (0, 1))
    wide = near * keep[:, None].astype(np.int32) + far * add[:, None].astype(np.int32)
    top, keep, add = taps(h, image.shape[0])
    above, below = (wide[clip(top + i, image.shape[0])] >> 4 for i in (0, 1))
    total = ((above * keep[:, None, None]) >> 16) + ((below * add[:, None, None]) >> 16)
    return ((total + 2) >> 2).astype(np.uint8)


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows along one axis.

    Every `stride` pixels; the last window is moved back inside. An axis no longer than the window
    has one window, of its own length.
    """
    if window < 1 or stride < 1:
        raise UserError(f"window {window} and stride {stride} must be at least 1 pixel")
    count = -(-max(length - window, 0) // stride) + 1
    return [max(min(i * stride, length - window), 0) for i in range(count)]


def window_grid(h: int, w: int, window: int, stride: int) -> list[tuple[int, int]]:
    """(top, left) of each window over an image of h x w pixels, row by row.

    Windows are min(window, h) x min(window, w) pixels, without padding.
    """
    tops, lefts = window_starts(h, window, stride), window_starts(w, window, stride)
    return [(top, left) for top in tops for left in lefts]


def grid_shape(h: int, w: int, length: int, rule: str = "exact") -> tuple[int, int]:
    """(rows, columns) of the `length` patches that a window of h x w pixels was cut into.

    Sides that are no multiple of the patch lose the remainder. The patch size need not be known:
    rows and columns both fall as it grows, so at most one grid has `length` patches.

    Args:
      rule: "exact", or "rounded_patch": the shorter side is divided by the rounded square root of
        the pixels per patch, as the released model does. Where a side is far from a multiple of
        the patch that is another grid, and where it is no grid at all, the exact one is taken.

    Raises:
      UserError: no square patch gives that many.
    """
    if rule == "rounded_patch":
        patch = round((h * w // length) ** 0.5)
        if h > w:
            rows, columns = length // max(w // patch, 1), w // patch
        else:
            rows, columns = h // patch, length // max(h // patch, 1)
        if rows * columns == length:
            return rows, columns
    for patch in range(int((h * w / length) ** 0.5), 0, -1):
        if (h // patch) * (w // patch) == length:
            return h // patch, w // patch
    raise UserError(f"{length} patches do not tile a window of {h} x {w} pixels")


def bilinear_taps(
    pixels: int, cells: int
) -> tuple[
    Integer[np.ndarray, " pixels"], Integer[np.ndarray, " pixels"], Float[np.ndarray, " pixels"]
]:
    """(low, high, part): pixel i is (1 - part) * cell low + part * cell high, in one dimension.

    Half-pixel centers, border values repeated, no antialiasing.
    """
    source = np.clip((np.arange(pixels) + 0.5) * cells / pixels - 0.5, 0, cells - 1)
    low = np.floor(source).astype(np.int32)
    return low, np.minimum(low + 1, cells - 1), (source - low).astype(np.float32)


def bilinear_weights(pixels: int, cells: int) -> Float[np.ndarray, "pixels cells"]:
    """Matrix of one-dimensional bilinear interpolation (see `bilinear_taps`); rows sum to one."""
    low, high, part = bilinear_taps(pixels, cells)
    weights = np.zeros((pixels, cells), np.float32)
    np.add.at(weights, (np.arange(pixels), low), 1 - part)
    np.add.at(weights, (np.arange(pixels), high), part)
    return weights


def nearest_weights(pixels: int, cells: int) -> Float[np.ndarray, "pixels cells"]:
    """Matrix of one-dimensional nearest-neighbor interpolation: one 1 in each row."""
    nearest = ((np.arange(pixels) + 0.5) * cells / pixels).astype(int)
    return np.eye(cells, dtype=np.float32)[np.minimum(nearest, cells - 1)]


def cell_weights(
    original: int, resized: int, window: int, stride: int, cells: int, *, nearest: bool = False
) -> Float[np.ndarray, "original windows_cells"]:
    """Matrix from the cells of all windows along one axis to the pixels of the original image.

    Args:
      original, resized: length of the axis in the original image, and in the resized one.
      window, stride: as in `window_starts`; `cells`: patches of one window along this axis.
      nearest: nearest neighbor instead of bilinear, for label votes.

    Column i * cells + j is cell j of window i; rows sum to one.
    """
    weights = nearest_weights if nearest else bilinear_weights
    starts = window_starts(resized, window, stride)
    length = min(window, resized)
    inside = weights(length, cells)
    placed = np.zeros((resized, len(starts), cells), np.float32)
    cover = np.zeros((resized, 1), np.float32)
    for i, start in enumerate(starts):
        placed[start : start + length, i] = inside
        cover[start : start + length] += 1
    mean = placed.reshape(resized, -1) / cover
    return mean if original == resized else weights(original, resized) @ mean
