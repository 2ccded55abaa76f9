"""Labels of one image with one group for each pixel, window by window, in float64."""

import numpy as np

from reference.transformer import softmax


def upsample(maps, size):
    """Bilinear with half-pixel centers, [h, w, C] -> [H, W, C]; source positions start at 0."""

    def along(axis, x, pixels):
        cells = x.shape[axis]
        position = np.maximum((np.arange(pixels) + 0.5) * cells / pixels - 0.5, 0)
        low = np.minimum(position.astype(int), cells - 1)
        high = np.minimum(low + 1, cells - 1)
        part = np.where(high > low, position - low, 0.0)
        part = np.expand_dims(part, tuple(i for i in range(x.ndim) if i != axis))
        return np.take(x, low, axis) * (1 - part) + np.take(x, high, axis) * part

    return along(1, along(0, maps, size[0]), size[1])


def window_scores(soft, groups, image, size, scale, threshold, image_classes, cap):
    """[H, W, N] of one window: background (where there is a threshold), then the classes.

    Args:
      soft: affinity of its patches, [h, w, K]. groups: cosines [K, C]. image: cosines [C].
    """
    p = softmax(scale * groups)
    if image_classes:
        order = np.argsort(-image)[:image_classes]
        second = np.zeros_like(p)
        second[:, order] = softmax(scale * groups[:, order])
        p = p * second
    member = upsample(soft, size).argmax(-1)
    scores = p[member]
    if threshold is None:
        return scores
    limit = min(threshold, p.max()) if cap else threshold
    background = (scores.max(-1, keepdims=True) < limit).astype(float)
    return np.concatenate([background, scores], -1)


def labels(windows, corners, resized, size):
    """(labels, difference of the best two scores) of the image from its windows' scores."""
    total, cover = np.zeros((*resized, windows[0].shape[-1])), np.zeros((*resized, 1))
    for scores, (top, left) in zip(windows, corners, strict=True):
        place = (slice(top, top + scores.shape[0]), slice(left, left + scores.shape[1]))
        total[place] += scores
        cover[place] += 1
    mean = upsample(total / cover, size)
    best = np.sort(mean, -1)
    return mean.argmax(-1), best[..., -1] - best[..., -2]
