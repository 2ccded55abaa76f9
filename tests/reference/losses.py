"""Eq. 7 and 9-13, written out."""

import itertools
import math

import numpy as np

from reference.transformer import sigmoid


def info_nce(a, b, scale, candidates):
    """Eq. 7 with the -log: one value per pair."""
    count = len(a)
    out = np.zeros(count)
    for i in range(count):
        allowed = [j for j in range(count) if j == i or candidates[i, j]]
        positive = math.exp(scale * a[i] @ b[i])
        to_b = positive / sum(math.exp(scale * a[i] @ b[j]) for j in allowed)
        allowed = [j for j in range(count) if j == i or candidates[j, i]]
        to_a = positive / sum(math.exp(scale * a[j] @ b[i]) for j in allowed)
        out[i] = -0.5 * (math.log(to_b) + math.log(to_a))
    return out


def multi_label_info_nce(a, b, scale, candidates, present):
    """The same with several texts per image: mean over the texts that are there."""
    count, out = len(a), np.zeros(len(a))
    for i in range(count):
        values = []
        texts = [
            (j, t)
            for j in range(count)
            if j == i or candidates[i, j]
            for t in np.flatnonzero(present[j])
        ]
        images = [j for j in range(count) if j == i or candidates[j, i]]
        for t in np.flatnonzero(present[i]):
            positive = math.exp(scale * a[i] @ b[i, t])
            to_text = positive / sum(math.exp(scale * a[i] @ b[j, u]) for j, u in texts)
            to_image = positive / sum(math.exp(scale * a[j] @ b[i, t]) for j in images)
            values.append(-0.5 * (math.log(to_text) + math.log(to_image)))
        out[i] = np.mean(values) if values else 0.0
    return out


def nearest_groups(joint, entity, count):
    """Subgroups of one image: most similar to the entity first."""
    similarity = [g @ entity for g in joint]
    return sorted(range(len(joint)), key=lambda k: -similarity[k])[:count]


def masks(patches, groups):
    """Eq. 10, [S, L], with the logits divided by the square root of the width."""
    return sigmoid((patches @ groups.T / math.sqrt(patches.shape[-1])).T)


def cosine(m, n):
    return m @ n / (np.linalg.norm(m) * np.linalg.norm(n))


def best_permutation(target, prediction):
    """Eq. 11 by trying all permutations."""
    size = len(target)
    return min(
        itertools.permutations(range(size)),
        key=lambda p: sum(-cosine(target[k], prediction[p[k]]) for k in range(size)),
    )


def dice(target, prediction):
    """D of Eq. 12 between a set and a soft mask; both empty are equal."""
    size = target.sum() + prediction.sum()
    return 1 - 2 * (target * prediction).sum() / size if size > 0 else 0.0


def consistency(online, teacher, entity, ratio, threshold):
    """Eq. 12 for one pair of images; `online[i]` and `teacher[i]` are (patches, groups, joint)."""
    count = round(ratio * len(online[0][1]))
    total = 0.0
    for here, there in ((0, 1), (1, 0)):
        patches, groups, joint = teacher[here]
        soft = masks(patches, groups[nearest_groups(joint, entity, count)])
        _, groups, joint = online[there]
        predicted = masks(online[here][0], groups[nearest_groups(joint, entity, count)])
        order = best_permutation(soft, predicted)
        target = (soft > threshold).astype(float)
        total += sum(dice(target[k], predicted[order[k]]) for k in range(count))
    return total / 2


# ---- the mask loss on queries and keys


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


def group_masks(q1, q2, k2, grid, size, threshold, cost):
    """(loss, share of pixels that targets cover) of a pair of images in one direction."""
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
