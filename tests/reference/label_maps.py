"""Label maps of one window, by the functions that a segmenter calls one at a time."""

from ovseg_jax.segmentation.readout import AnyArray, after_spread, before_spread, spread
from ovseg_jax.segmentation.windows import bilinear_weights, nearest_weights
from ovseg_jax.shapes import Array, Float, Int


def label_map(
    p: Float[AnyArray, "B h w C"],
    threshold: float | Float[AnyArray, ""] | None,
    size: tuple[int, int],
    order: str = "upsample_first",
    owners: tuple[int, ...] | None = None,
) -> Int[Array, "B H W"]:
    """Labels of one window's pixels, see `decide`.

    Args:
      size: (H, W) in pixels.
      order: 'upsample_first' interpolates the probabilities (bilinear) and then decides;
        'argmax_first', the order of Eq. 1, decides by patch and repeats the labels.
    """
    weights = bilinear_weights if order == "upsample_first" else nearest_weights
    rows, columns = (weights(n, m) for n, m in zip(size, p.shape[1:3], strict=True))
    maps = before_spread(p, threshold, order, owners)
    return after_spread(spread(maps, rows, columns), threshold, order, owners)
