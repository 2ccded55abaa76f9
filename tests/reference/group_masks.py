"""The mask loss on queries and keys, one pair of images and one direction, written out."""

import itertools

import numpy as np

from reference.transformer import sigmoid


def enlarge(cells, grid, size):
    """Bilinear, corners of both images coinciding; `cells` and the result are flat, row-major."""
    cells = cells.reshape(grid)

    def around(index, pixels, count):
        position = index * (count - 1) / (pixels - 1) if pixels > 1 else 0.0
        low = min(int(position), count - 1)
        return low, min(low + 1, count - 1), position - low

    out = np.zeros(size)
    for y in range(size[0]):
        top, bottom, down = around(y, size[0], grid[0])
        for x in range(size[1]):
            left, right, across = around(x, size[1], grid[1])
            upper = (1 - across) * cells[top, left] + across * cells[top, right]
            lower = (1 - across) * cells[bottom, left] + across * cells[bottom, right]
            out[y, x] = (1 - down) * upper + down * lower
    return out.ravel()


def direction(q1, q2, k2, grid, size, threshold, cost):
    """(loss, share of pixels that targets cover)."""
    scale = k2.shape[1] ** -0.5
    predicted = [enlarge(k2 @ q * scale, grid, size) for q in q1]
    targets = [enlarge(k2 @ q * scale, grid, size) for q in q2]

    def price(m, t):
        m, t = m / np.linalg.norm(m), t / np.linalg.norm(t)
        return np.linalg.norm(m - t) if cost == "euclidean" else -m @ t

    count = len(q1)
    order = min(
        itertools.permutations(range(count)),
        key=lambda p: sum(price(predicted[k], targets[p[k]]) for k in range(count)),
    )
    inside = overlap = area = 0.0
    for k in range(count):
        soft = sigmoid(targets[order[k]])
        binary = (soft >= threshold * soft.max()).astype(float)
        stretched = (predicted[k] - predicted[k].min()) / np.ptp(predicted[k])
        overlap += (binary * stretched).sum()
        inside += binary.sum()
        area += stretched.sum()
    return 1 - (2 * overlap + 1) / (inside + area + 1), inside / count / size[0] / size[1]
