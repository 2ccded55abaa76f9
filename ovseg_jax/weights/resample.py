"""Patch embeddings and position embeddings for another patch size and grid than their own.

Done once, to the weights, where `config.model.resample_init` asks for it. A model that keeps the
weights' patch size and grid needs none of it: positions then follow the image while it runs.
"""

import numpy as np

from ovseg_jax.models.positions import cubic_weights


def resize_patch(kernel: np.ndarray, patch: int) -> np.ndarray:
    """A patch embedding for patches of another size (FlexiViT, Beyer et al., 2023, Eq. 2-4).

    The new kernel answers to a resized patch as the old one does to the patch itself: exactly
    where patches grow, in the least-squares sense where they shrink.

    Args:
      kernel: [D, 3, P, P]. patch: new size, pixels.

    Returns:
      [D, 3, patch, patch], float32.
    """
    enlarge = cubic_weights(kernel.shape[-1], patch).astype(np.float64)
    inverse = np.linalg.pinv(enlarge.T)
    result = np.einsum("ai,bj,dcij->dcab", inverse, inverse, kernel.astype(np.float64))
    return result.astype(np.float32)


def resize_positions(
    table: np.ndarray, source: tuple[int, int], target: tuple[int, int]
) -> np.ndarray:
    """Position embeddings [L, D] of a `source` grid on a `target` grid, bicubically, float32.

    The arithmetic of `models.positions.resize_grid` without antialiasing.
    """
    down, across = (cubic_weights(a, b) for a, b in zip(source, target, strict=True))
    grid = np.asarray(table, np.float32).reshape(*source, -1)
    return np.einsum("th,sw,hwd->tsd", down, across, grid).reshape(target[0] * target[1], -1)
