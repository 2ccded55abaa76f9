"""Patches in row-major order and bicubic resizing, pixel by pixel."""

import math

import numpy as np


def patches(image, size):
    """[H, W, 3] to [L, size * size * 3]: patches row by row, pixels of a patch row by row."""
    rows, columns = image.shape[0] // size, image.shape[1] // size
    out = []
    for i in range(rows):
        for j in range(columns):
            pixels = []
            for y in range(size):
                for x in range(size):
                    pixels.extend(image[i * size + y, j * size + x])
            out.append(pixels)
    return np.array(out)


def keys_kernel(t, a=-0.75):
    """Keys (1981), the piecewise cubic with support 2."""
    t = abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    if t < 2:
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    return 0.0


def bicubic(grid, target):
    """[h, w, D] to [target rows, target columns, D]: half-pixel centers, borders repeated."""
    h, w = grid.shape[:2]
    out = np.zeros((*target, grid.shape[-1]))
    for i in range(target[0]):
        for j in range(target[1]):
            y, x = (i + 0.5) * h / target[0] - 0.5, (j + 0.5) * w / target[1] - 0.5
            for m in range(math.floor(y) - 1, math.floor(y) + 3):
                for n in range(math.floor(x) - 1, math.floor(x) + 3):
                    near = grid[min(max(m, 0), h - 1), min(max(n, 0), w - 1)]
                    out[i, j] += keys_kernel(y - m) * keys_kernel(x - n) * near
    return out
