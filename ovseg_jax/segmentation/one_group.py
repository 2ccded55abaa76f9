"""Label maps where each pixel belongs to one group: GroupViT's rule and the released model's.

The soft map of a window is upsampled to its pixels and each pixel goes to its best group; all
pixels of a group share the probabilities of its classes. Windows are averaged, the mean is resized
to the original image, and the best class wins. `readout` has the paper's own order (Eq. 1).

The probability of a class is softmax over the classes, and (with `image_classes`) its product with
a second softmax among the classes that are most like the whole window.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ovseg_jax.segmentation.readout import spread
from ovseg_jax.segmentation.windows import bilinear_taps, bilinear_weights
from ovseg_jax.shapes import Array, Float, Int

AnyArray = Array | np.ndarray


def group_probabilities(
    groups: Float[AnyArray, "B K C"],
    image: Float[AnyArray, "B C"],
    scale: float | Float[AnyArray, ""],
    image_classes: int,
) -> Float[Array, "B K C"]:
    """The probability of each class for each group of a window.

    Args:
      groups, image: cosines of the groups and of the whole window with the classes.
      scale: factor on the cosines.
      image_classes: how many classes the second softmax is over (all, where there are fewer); 0
        for only the first softmax.
    """
    logits = jnp.asarray(groups) * jnp.asarray(scale, jnp.float32)
    first = jax.nn.softmax(logits, axis=-1)
    if image_classes == 0:
        return first
    classes = logits.shape[-1]
    best = jax.lax.top_k(jnp.asarray(image), min(image_classes, classes))[1]
    kept = jnp.any(best[..., None] == jnp.arange(classes)[None, None], axis=1)
    return first * jax.nn.softmax(jnp.where(kept[:, None], logits, -jnp.inf), axis=-1)


def with_background(
    p: Float[AnyArray, "B K C"], threshold: float | Float[AnyArray, ""], cap: bool
) -> Float[Array, "B K N"]:
    """A background column before the classes: 1 for groups whose best class is below the threshold.

    Args:
      cap: lower the threshold to the window's best probability where it is above it.
    """
    p = jnp.asarray(p)
    best = jnp.max(p, axis=-1, keepdims=True)
    threshold = jnp.asarray(threshold, jnp.float32)
    if cap:
        threshold = jnp.minimum(threshold, jnp.max(best, axis=1, keepdims=True))
    return jnp.concatenate([(best < threshold).astype(p.dtype), p], axis=-1)


@functools.partial(jax.jit, static_argnames=("size",))
def pixel_groups(
    soft: Float[AnyArray, "windows h w K"], size: tuple[int, int]
) -> Int[Array, "windows H W"]:
    """The best group of each pixel of each window, after bilinear upsampling."""
    rows, columns = (bilinear_weights(n, m) for n, m in zip(size, soft.shape[1:3], strict=True))
    return jnp.argmax(spread(soft, rows, columns), axis=-1).astype(jnp.int32)


def canvas(
    members: Int[AnyArray, "windows h w"],
    tables: Float[AnyArray, "windows K N"],
    row: Int[AnyArray, " H"],
    corners: tuple[tuple[int, int], ...],
    width: int,
) -> Float[Array, "H width N"]:
    """Mean over windows of the scores on some rows of the segmented image; for the arguments see
    `_label_band`."""
    (height, across), row = members.shape[1:], jnp.asarray(row)
    total = jnp.zeros((row.shape[0], width, tables.shape[-1]), jnp.float32)
    cover = jnp.zeros((row.shape[0], width, 1), jnp.float32)
    for index, (top, left) in enumerate(corners):
        inside = ((row >= top) & (row < top + height))[:, None, None].astype(jnp.float32)
        scores = tables[index][members[index][jnp.clip(row - top, 0, height - 1)]]
        # Padded and added: XLA makes a scatter of `.at[].add`, which is slow on a CPU.
        around = ((0, 0), (left, width - left - across), (0, 0))
        total += jnp.pad(scores * inside, around)
        cover += jnp.pad(jnp.broadcast_to(inside, (row.shape[0], across, 1)), around)
    return total / cover


@functools.partial(jax.jit, static_argnames=("corners", "width"))
def _label_band(
    members: Int[AnyArray, "windows h w"],
    tables: Float[AnyArray, "windows K N"],
    row: Int[AnyArray, " R"],
    rows: tuple[AnyArray, AnyArray, AnyArray],
    columns: tuple[AnyArray, AnyArray, AnyArray],
    corners: tuple[tuple[int, int], ...],
    width: int,
) -> Int[Array, "H W"]:
    """Labels of some rows of the original image: the column of the table that wins each pixel.

    Args:
      members: group of each pixel of each window.
      tables: scores of the pixels of each group.
      row: the rows of the segmented image that they are interpolated from.
      rows, columns: taps from the segmented to the original image, see `windows.bilinear_taps`;
        those of rows are positions in `row`.
      corners: (top, left) of each window in the segmented image.
      width: of that image.
    """
    low, high, part = (jnp.asarray(x) for x in rows)
    part = part[:, None, None]
    made = canvas(members, tables, row, corners, width)
    mixed = made[low] * (1.0 - part) + made[high] * part
    low, high, part = (jnp.asarray(x) for x in columns)
    part = part[None, :, None]
    mixed = mixed[:, low] * (1.0 - part) + mixed[:, high] * part
    return jnp.argmax(mixed, axis=-1).astype(jnp.int32)


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
    """The label map of an image: 0 for background and 1 + class, or the class without threshold.

    Args:
      soft: affinity of each window's patches to the groups.
      p: see `group_probabilities`.
      window: (height, width) of the windows.
      corners: (top, left) of each window.
      resized, size: (height, width) of the image that was segmented, and of the original.
      cap: see `with_background`.
      classes: the class of each word, -1 for background.
      band_floats: scores that exist at once; larger images are labeled in bands of rows.
    """
    tables = jnp.asarray(p) if threshold is None else with_background(p, threshold, cap)
    members = pixel_groups(soft, window)
    down, across = (bilinear_taps(n, m) for n, m in zip(size, resized, strict=True))
    # Rows of the canvas, twice, and of the result exist together.
    band = max(1, min(size[0], band_floats // (3 * max(size[1], resized[1]) * tables.shape[-1])))
    bands = [tuple(x[start : start + band] for x in down) for start in range(0, size[0], band)]
    bands[-1] = tuple(np.pad(x, (0, band - len(x)), mode="edge") for x in bands[-1])
    # Rows that two rows of the original image share are made once.
    made = [np.unique(np.concatenate([low, high])) for low, high, _ in bands]
    most = max(len(row) for row in made)
    columns = []
    for row, (low, high, part) in zip(made, bands, strict=True):
        winners = _label_band(
            members,
            tables,
            np.pad(row, (0, most - len(row)), mode="edge"),
            (np.searchsorted(row, low), np.searchsorted(row, high), part),
            across,
            corners=corners,
            width=resized[1],
        )
        columns.append(np.asarray(winners))
    # The winning column of the table: the background, if there is one, then the words.
    labels = classes if threshold is None else np.concatenate([[0], classes + 1])
    return labels.astype(np.int32)[np.concatenate(columns)[: size[0]]]
