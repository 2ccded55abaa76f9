"""Label maps of a single window, made with the functions of `readout`."""

import jax
import numpy as np

from ovseg_jax.segmentation.readout import AnyArray, decide, spread
from ovseg_jax.segmentation.windows import bilinear_weights, nearest_weights
from ovseg_jax.shapes import Float, Int


def label_map(
    p: Float[AnyArray, "B h w C"],
    threshold: float | None,
    size: tuple[int, int],
    order: str = "upsample_first",
    word_to_class: tuple[int, ...] | None = None,
) -> Int[np.ndarray, "B H W"]:
    """Labels of the window's pixels, see `decide`.

    Args:
      size: (H, W) in pixels.
      order: 'upsample_first' interpolates the probabilities (bilinear) and then decides;
        'argmax_first', the order of Eq. 1, decides by patch and repeats the labels.
    """
    classes = np.arange(p.shape[-1]) if word_to_class is None else np.asarray(word_to_class)
    weights = bilinear_weights if order == "upsample_first" else nearest_weights
    rows, columns = (weights(n, m) for n, m in zip(size, p.shape[1:3], strict=True))
    if order == "upsample_first":
        p = np.asarray(spread(p, rows, columns))
        return decide(p.max(-1), p.argmax(-1), threshold, classes)
    p = np.asarray(p)
    labels = decide(p.max(-1), p.argmax(-1), threshold, classes)
    votes = jax.nn.one_hot(labels, int(labels.max()) + 1)
    return np.asarray(spread(votes, rows, columns)).argmax(-1)
