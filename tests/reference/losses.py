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
