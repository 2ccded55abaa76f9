"""From windows of an image to scores, probabilities and labels: pure functions of arrays.

Upsampling each window, averaging where windows overlap and resizing the mean to the original image
are one linear map along each axis (`cell_weights`), so rows can be computed in bands. *Soft
patches* (Eq. 1): softmax(scale * A G T^T), interpolated to pixels. *One group* (the rule of
GroupViT and the released model): a pixel has the probabilities of its best group (`label_image`).
"""

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from ovseg_jax.errors import UserError
from ovseg_jax.shapes import Array, Float, Int, UInt8

AnyArray = Array | np.ndarray
Scalar = float | Float[AnyArray, ""]
# The default on TPU and recent GPUs rounds inputs of a matmul to about three digits, which moves
# labels near a tie.
EXACT = jax.lax.Precision.HIGHEST
PATCH = 16  # pixels; no published model of this family has larger patches

# ---- sizes and positions of windows


def resized_shape(h: int, w: int, short_side: int, long_limit: int) -> tuple[int, int]:
    """Size at which an image is segmented: the short side becomes `short_side` unless the long side
    would exceed `long_limit`. The aspect is kept unless a side would be shorter than a patch."""
    factor = min(long_limit / max(h, w), short_side / min(h, w))
    least = min(PATCH, short_side)
    return max(least, int(h * factor + 0.5)), max(least, int(w * factor + 0.5))


def resize_image(
    image: UInt8[np.ndarray, "H W 3"], h: int, w: int, how: str = "antialiased"
) -> UInt8[np.ndarray, "h w 3"]:
    """Bilinear resize: "antialiased" (Pillow), or from the "four_pixels" that are nearest, bit for
    bit like OpenCV's linear interpolation."""
    if image.shape[:2] == (h, w):
        return image
    if how == "antialiased":
        return np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR))

    def taps(pixels: int, cells: int) -> tuple[np.ndarray, ...]:
        source = ((np.arange(pixels) + 0.5) * (cells / pixels) - 0.5).astype(np.float32)
        low = np.floor(source)
        part = source - low
        weights = (np.rint(x * np.float32(2048)).astype(np.int32) for x in (1 - part, part))
        return low.astype(int), *weights

    # Weights are multiples of 1/2048, and digits are cut in between, hence the shifts.

    (down, across), full = image.shape[:2], image.astype(np.int32)
    left, keep, add = taps(w, across)
    outside = (left < 0) | (left >= across - 1)
    keep, add = np.where(outside, 2048, keep), np.where(outside, 0, add)
    near, far = (full[:, np.clip(left + i, 0, across - 1)] for i in (0, 1))
    wide = near * keep[:, None].astype(np.int32) + far * add[:, None].astype(np.int32)
    top, keep, add = taps(h, down)
    above, below = (wide[np.clip(top + i, 0, down - 1)] >> 4 for i in (0, 1))
    total = ((above * keep[:, None, None]) >> 16) + ((below * add[:, None, None]) >> 16)
    return ((total + 2) >> 2).astype(np.uint8)


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows along an axis; the last window is moved back inside."""
    count = -(-max(length - window, 0) // stride) + 1
    return [max(min(i * stride, length - window), 0) for i in range(count)]


def window_grid(h: int, w: int, window: int, stride: int) -> list[tuple[int, int]]:
    """(top, left) of each window of min(window, h) x min(window, w) pixels, row by row."""
    tops, lefts = window_starts(h, window, stride), window_starts(w, window, stride)
    return [(top, left) for top in tops for left in lefts]


def grid_shape(h: int, w: int, length: int, rule: str = "exact") -> tuple[int, int]:
    """(rows, columns) of the `length` square patches that a window of h x w pixels was cut into.

    The rule "rounded_patch" is that of the released model, where it gives `length` patches: the
    shorter side is divided by the rounded square root of the pixels per patch.
    """
    if rule == "rounded_patch":
        shorter = min(h, w) // round((h * w // length) ** 0.5)
        longer = length // max(shorter, 1)
        if shorter * longer == length:
            return (longer, shorter) if h > w else (shorter, longer)
    # Rows and columns both fall as the patch grows, so at most one grid has `length` patches.
    for patch in range(int((h * w / length) ** 0.5), 0, -1):
        if (h // patch) * (w // patch) == length:
            return h // patch, w // patch
    raise UserError(f"{length} patches do not tile a window of {h} x {w} pixels")


# ---- from cells to pixels


def bilinear_taps(pixels: int, cells: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(low, high, part) [pixels]: pixel i is (1 - part) * cell low + part * cell high, with
    half-pixel centers and border values repeated."""
    source = np.clip((np.arange(pixels) + 0.5) * cells / pixels - 0.5, 0, cells - 1)
    low = np.floor(source).astype(np.int32)
    return low, np.minimum(low + 1, cells - 1), (source - low).astype(np.float32)


def bilinear_weights(pixels: int, cells: int) -> Float[np.ndarray, "pixels cells"]:
    """Matrix of one-dimensional bilinear interpolation; rows sum to one."""
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
    """Matrix from the cells of all windows along an axis (column i * cells + j is cell j of window
    i) to the `original` pixels of the image, which has `resized` pixels where it was cut.

    Rows sum to one. With `nearest`, each row votes for one cell a window.
    """
    weights = nearest_weights if nearest else bilinear_weights
    starts, length = window_starts(resized, window, stride), min(window, resized)
    placed = np.zeros((resized, len(starts), cells), np.float32)
    cover = np.zeros((resized, 1), np.float32)
    for i, start in enumerate(starts):
        placed[start : start + length, i] = weights(length, cells)
        cover[start : start + length] += 1
    mean = placed.reshape(resized, -1) / cover
    return mean if original == resized else weights(original, resized) @ mean


def spread(
    maps: Float[AnyArray, "B h w C"], rows: Float[AnyArray, "H h"], columns: Float[AnyArray, "W w"]
) -> Float[Array, "B H W C"]:
    """Cells to pixels with one matrix for each axis (see `cell_weights`)."""
    b, h, _, c = maps.shape
    wide = jnp.einsum("Ww,bhwc->bhWc", columns, maps, precision=EXACT)
    # A matrix for each image, though they are equal: with one for all, XLA computes [H,B,W,C] and
    # transposes the large result, which takes as long as everything else.
    rows = jnp.broadcast_to(jnp.asarray(rows), (b, *rows.shape))
    tall = jnp.matmul(rows, wide.reshape(b, h, -1), precision=EXACT)
    return tall.reshape(b, rows.shape[1], columns.shape[0], c)


# ---- scores and probabilities


def unit(x: Float[AnyArray, "... E"]) -> Float[Array, "... E"]:
    """`x` in f32 with unit norm along the last axis; a zero vector stays zero."""
    x = jnp.asarray(x).astype(jnp.float32)
    norm = jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))
    return x / jnp.maximum(norm, jnp.float32(1e-12))


def cosines(
    tokens: Float[AnyArray, "B K E"], text: Float[AnyArray, "C E"]
) -> Float[Array, "B K C"]:
    """Cosine of each token with each class."""
    return jnp.einsum("bke,ce->bkc", unit(tokens), unit(text), precision=EXACT)


def class_scores(
    affinity: Float[AnyArray, "B L K"],
    groups: Float[AnyArray, "B K E"],
    text: Float[AnyArray, "C E"],
    grid: tuple[int, int],
) -> Float[Array, "B h w C"]:
    """A G T^T of Eq. 1 on the grid (rows, columns) of L patches, with unit groups and classes."""
    cosine = cosines(groups, text)
    affinity = jnp.asarray(affinity).astype(jnp.float32)
    scores = jnp.einsum("blk,bkc->blc", affinity, cosine, precision=EXACT)
    return scores.reshape(scores.shape[0], *grid, scores.shape[-1])


def probabilities(scores: Float[AnyArray, "... C"], scale: Scalar) -> Float[Array, "... C"]:
    """softmax over the classes of `scale` * `scores`."""
    return jax.nn.softmax(jnp.asarray(scores) * jnp.asarray(scale, jnp.float32), axis=-1)


def downweight_by_image_score(
    p: Float[AnyArray, "... C"],
    margins: Float[AnyArray, "... C"],
    scale: Scalar,
    foreground: float | Float[AnyArray, "... words"] = 0.0,
) -> Float[Array, "... C"]:
    """p * exp(scale * margin + foreground): lower for classes that the whole image speaks against.

    A class's margin is its cosine with the image embedding, minus that of the image's best class:
    the contrastive loss trains that embedding, so it is surer of what there is than groups.
    """
    exponent = jnp.asarray(margins) * jnp.asarray(scale, jnp.float32) + jnp.asarray(foreground)
    return jnp.asarray(p) * jnp.exp(exponent)


def foreground_log(keys: Float[AnyArray, "h w D"], scale: float) -> Float[Array, "h w"]:
    """-scale * max(0, cosine of each cell's feature with the mean feature of the border cells).

    A log-probability that a cell shows the image's subject: borders show surroundings more often
    (Wei et al., Geodesic Saliency Using Background Priors, ECCV 2012).
    """
    features = unit(keys)
    inside = jnp.zeros(features.shape[:2], jnp.float32).at[1:-1, 1:-1].set(1.0)
    weights = (1.0 - inside) / jnp.sum(1.0 - inside)
    border = jnp.einsum("hw,hwd->d", weights, features, precision=EXACT)
    likeness = jnp.einsum("hwd,d->hw", features, unit(border), precision=EXACT)
    return -scale * jax.nn.relu(likeness)


def decide(
    highest: Float[np.ndarray, "..."],
    best: Int[np.ndarray, "..."],
    threshold: float | np.float32 | Float[np.ndarray, "..."] | None,
    classes: Int[np.ndarray, " words"],
) -> Int[np.ndarray, "..."]:
    """The label of each position, from its best word and that word's probability: 1 + the word's
    class, or 0 (background) below the threshold and for class -1; without threshold the class."""
    labels = (classes + (threshold is not None)).astype(np.int32)[best]
    if threshold is not None:
        labels[highest < threshold] = 0
    return labels


# ---- one group for each pixel


def group_probabilities(
    groups: Float[AnyArray, "B K C"], image: Float[AnyArray, "B C"], scale: Scalar, kept: int
) -> Float[Array, "B K C"]:
    """The probability of each class for each group of a window, from the cosines of the groups and
    of the whole window with the classes. With `kept`, it is multiplied by a second softmax over so
    many classes, those most like the whole window."""
    logits = jnp.asarray(groups) * jnp.asarray(scale, jnp.float32)
    first = jax.nn.softmax(logits, axis=-1)
    if kept == 0:
        return first
    classes = logits.shape[-1]
    best = jax.lax.top_k(jnp.asarray(image), min(kept, classes))[1]
    is_kept = jnp.any(best[..., None] == jnp.arange(classes)[None, None], axis=1)
    return first * jax.nn.softmax(jnp.where(is_kept[:, None], logits, -jnp.inf), axis=-1)


def with_background(p: Float[AnyArray, "B K C"], threshold: Scalar, cap: bool) -> Array:
    """A background column before the classes: 1 for groups whose best class is below the threshold,
    which `cap` lowers to the window's best probability."""
    p = jnp.asarray(p)
    best = jnp.max(p, axis=-1, keepdims=True)
    threshold = jnp.asarray(threshold, jnp.float32)
    if cap:
        threshold = jnp.minimum(threshold, jnp.max(best, axis=1, keepdims=True))
    return jnp.concatenate([(best < threshold).astype(p.dtype), p], axis=-1)


@jax.jit(static_argnames="size")
def pixel_groups(soft: Float[AnyArray, "windows h w K"], size: tuple[int, int]) -> Array:
    """The best group of each pixel [windows, H, W], after bilinear upsampling."""
    rows, columns = (bilinear_weights(n, m) for n, m in zip(size, soft.shape[1:3], strict=True))
    return jnp.argmax(spread(soft, rows, columns), axis=-1).astype(jnp.int32)


@jax.jit(static_argnames=("corners", "width"))
def _label_band(members, tables, row, rows, columns, corners, width):
    """The column of the tables that wins each pixel of some rows of the original image. The taps
    `rows` are positions in `row`, the rows of the segmented image that are needed."""
    height, across = members.shape[1:]
    total = jnp.zeros((row.shape[0], width, tables.shape[-1]), jnp.float32)
    cover = jnp.zeros((row.shape[0], width, 1), jnp.float32)
    for index, (top, left) in enumerate(corners):
        inside = ((row >= top) & (row < top + height))[:, None, None].astype(jnp.float32)
        scores = tables[index][members[index][jnp.clip(row - top, 0, height - 1)]]
        # Padded and added: XLA makes a scatter of `.at[].add`, which is slow on a CPU.
        around = ((0, 0), (left, width - left - across), (0, 0))
        total += jnp.pad(scores * inside, around)
        cover += jnp.pad(jnp.broadcast_to(inside, (row.shape[0], across, 1)), around)
    mean = total / cover
    for axis, (low, high, part) in enumerate((rows, columns)):
        part = jnp.expand_dims(part, (1, 2) if axis == 0 else (0, 2))
        mean = jnp.take(mean, low, axis) * (1.0 - part) + jnp.take(mean, high, axis) * part
    return jnp.argmax(mean, axis=-1).astype(jnp.int32)


def label_image(
    soft: Float[np.ndarray, "windows h w K"],
    p: Float[AnyArray, "windows K C"],
    *,
    window: tuple[int, int],
    corners: tuple[tuple[int, int], ...],
    resized: tuple[int, int],
    size: tuple[int, int],
    threshold: float | None,
    cap: bool,
    classes: Int[np.ndarray, " words"],
    band_floats: int,
) -> Int[np.ndarray, "H W"]:
    """The label map of an image, see `decide`.

    Args:
      soft: affinity of each window's patches to the groups; p: see `group_probabilities`.
      window: (height, width) of the windows; corners: (top, left) of each.
      resized, size: (height, width) of the image that was segmented, and of the original.
      threshold, cap: see `with_background`.
      band_floats: scores that exist at once; larger images are labeled in bands of rows.
    """
    tables = jnp.asarray(p) if threshold is None else with_background(p, threshold, cap)
    members = pixel_groups(soft, window)
    down, across = (bilinear_taps(n, m) for n, m in zip(size, resized, strict=True))
    # Rows of the mean over windows, twice, and of the result exist together.
    band = max(1, min(size[0], band_floats // (3 * max(size[1], resized[1]) * tables.shape[-1])))
    bands = [tuple(x[start : start + band] for x in down) for start in range(0, size[0], band)]
    bands[-1] = tuple(np.pad(x, (0, band - len(x)), mode="edge") for x in bands[-1])
    # Rows that two rows of the original image share are made once.
    needed = [np.unique(np.concatenate([low, high])) for low, high, _ in bands]
    most = max(len(row) for row in needed)
    winners = []
    for row, (low, high, part) in zip(needed, bands, strict=True):
        taps = np.searchsorted(row, low), np.searchsorted(row, high), part
        row = np.pad(row, (0, most - len(row)), mode="edge")
        winners.append(_label_band(members, tables, row, taps, across, corners, resized[1]))
    # The winning column of the table: the background, if there is one, then the words.
    labels = classes if threshold is None else np.concatenate([[0], classes + 1])
    return labels.astype(np.int32)[np.concatenate(winners)[: size[0]]]
