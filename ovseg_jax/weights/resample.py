"""Position embeddings for another grid than their own.

Done once, to the weights, where `config.model.resample_init` asks for it. A model that keeps the
weights' grid needs none of it: positions then follow the image while it runs.
"""

import numpy as np

from ovseg_jax.models.positions import cubic_weights


def resize_positions(
    table: np.ndarray, source: tuple[int, int], target: tuple[int, int]
) -> np.ndarray:
    """Position embeddings [L, D] of a `source` grid on a `target` grid, bicubically, float32.

    The arithmetic of `models.positions.resize_grid` without antialiasing.
    """
    down, across = (cubic_weights(a, b) for a, b in zip(source, target, strict=True))
    grid = np.asarray(table, np.float32).reshape(*source, -1)
    return np.einsum("th,sw,hwd->tsd", down, across, grid).reshape(target[0] * target[1], -1)
