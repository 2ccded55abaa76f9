"""Refinement options, each against the same in plain NumPy."""

import numpy as np
import pytest

from ovseg_jax.segmentation import labels as labels_module
from ovseg_jax.segmentation import windows
from ovseg_jax.segmentation.labels import DILATIONS, label_maps, pamr
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.segmentation.scores import image_scores

PATCH, K, C = 4, 5, 4
PROTOCOL = Protocol(short_side=20, long_limit=64, window=20, stride=8, scale=6.0, threshold=0.3)


class Linear:
    """Groups and affinities are fixed linear maps of a patch's mean color."""

    rng = np.random.default_rng(3)
    to_groups = rng.normal(size=(3, K)).astype(np.float32)
    groups = rng.normal(size=(K, C)).astype(np.float32)

    def encode(self, images):
        b, h, w, _ = images.shape
        h, w = h // PATCH, w // PATCH
        cells = images[:, : h * PATCH, : w * PATCH].reshape(b, h, PATCH, w, PATCH, 3)
        color = cells.mean((2, 4)).reshape(b, h * w, 3) / 64.0
        # Where a patch lies in its window matters too, so that a mirrored image is another one.
        place = np.arange(h * w) % w / w
        logits = color.astype(np.float32) @ self.to_groups + place[:, None] * self.to_groups[0]
        logits = logits.astype(np.float32)
        affinity = np.exp(logits - logits.max(-1, keepdims=True))
        affinity /= affinity.sum(-1, keepdims=True)
        return affinity, np.tile(self.groups, (b, 1, 1)), np.ones((b, C), np.float32)

    def text(self, names, templates):
        return (np.eye(C, dtype=np.float32),) * 2


def pictures():
    rng = np.random.default_rng(0)
    for h, w in ((20, 20), (23, 41), (64, 30)):
        coarse = rng.integers(0, 256, (-(-h // 6), -(-w // 6), 3), np.uint8)
        yield coarse.repeat(6, 0).repeat(6, 1)[:h, :w]


def found(protocol, word_to_class=None):
    scored = image_scores(Linear().encode, Linear().text((), ()), pictures(), protocol, 4)
    labels = {one.index: labels for one, labels in label_maps(scored, protocol, word_to_class)}
    return [labels[i] for i in range(len(labels))]


def upsample(maps, size):
    rows, columns = (windows.bilinear_weights(n, m) for n, m in zip(size, maps.shape, strict=False))
    return np.einsum("Hh,hwc,Ww->HWc", rows.astype(np.float64), maps, columns.astype(np.float64))


def numpy_pamr(maps, image, steps, dilations):
    h, w, _ = maps.shape
    image = image / 255.0

    def values(x):
        ys, xs = np.mgrid[:h, :w]
        return np.stack(
            [
                x[np.clip(ys + d * i, 0, h - 1), np.clip(xs + d * j, 0, w - 1)]
                for d in dilations
                for i in (-1, 0, 1)
                for j in (-1, 0, 1)
            ]
        )

    center = np.array([i == 4 for _ in dilations for i in range(9)])
    everywhere = values(image)
    deviation = everywhere.std(0, ddof=1)
    logits = -(np.abs(everywhere[~center] - image) / (0.1 * deviation + 1e-8)).mean(-1)
    weights = np.exp(logits - logits.max(0))
    weights /= weights.sum(0)
    for _ in range(steps):
        maps = (values(maps)[~center] * weights[..., None]).sum(0)
    return maps


def plain(image, protocol, words=C):
    """One image by the book: window by window, then refinement, then labels."""
    size = image.shape[:2]
    resized = windows.resized_shape(*size, protocol.short_side, protocol.long_limit)
    late = protocol.averaged == "cosines"
    seen = windows.resize_image(image, *resized)
    total, cover = np.zeros((*resized, C)), np.zeros((*resized, 1))
    for top, left in windows.window_grid(*resized, protocol.window, protocol.stride):
        part = seen[top : top + protocol.window, left : left + protocol.window]
        affinity, groups, _ = (x[0].astype(np.float64) for x in Linear().encode(part[None]))
        unit = groups / np.linalg.norm(groups, axis=-1, keepdims=True)
        scores = affinity @ unit
        if not late:
            scores = softmax(protocol.scale * scores)
        scores = scores.reshape(part.shape[0] // PATCH, part.shape[1] // PATCH, C)
        place = (slice(top, top + part.shape[0]), slice(left, left + part.shape[1]))
        total[place] += upsample(scores, part.shape[:2])
        cover[place] += 1
    maps = total / cover
    if protocol.pamr_steps:
        maps = numpy_pamr(maps, seen, protocol.pamr_steps, DILATIONS)
    maps = upsample(maps, size)
    p = softmax(protocol.scale * maps) if late else maps
    if protocol.min_area:
        areas = np.bincount(p.argmax(-1).ravel(), minlength=C)
        p = p * (areas > protocol.min_area * areas.sum())
    best = np.sort(p, -1)
    margin = np.minimum(best[..., -1] - best[..., -2], np.abs(best[..., -1] - protocol.threshold))
    return np.where(p.max(-1) < protocol.threshold, 0, p.argmax(-1) + 1), margin


def softmax(x):
    exponents = np.exp(x - x.max(-1, keepdims=True))
    return exponents / exponents.sum(-1, keepdims=True)


OPTIONS = {
    "none": {},
    "pamr": {"pamr_steps": 3},
    "cosines": {"averaged": "cosines"},
    "cosines, refined": {"averaged": "cosines", "pamr_steps": 1},
    "large classes alone": {"min_area": 0.35},
    "large classes alone, refined": {"min_area": 0.2, "averaged": "cosines", "pamr_steps": 1},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_against_plain_numpy(name):
    protocol = PROTOCOL.replace(**OPTIONS[name])
    changed = 0
    for image, labels, before in zip(pictures(), found(protocol), found(PROTOCOL), strict=True):
        expected, margin = plain(image, protocol)
        clear = margin > 1e-4
        assert clear.mean() > 0.99
        np.testing.assert_array_equal(labels[clear], expected[clear])
        changed += (labels != before).sum()
    assert (changed > 0) == (name != "none")


def test_pamr_against_plain_numpy():
    rng = np.random.default_rng(2)
    maps = rng.random((13, 17, 3)).astype(np.float32)
    image = rng.integers(0, 256, (13, 17, 3), np.uint8)
    image[:5] = 90  # a flat part, where nothing deviates
    dilations = (1, 2, 4, 8, 12, 24)
    ours = pamr(maps, image, steps=10, dilations=dilations)
    np.testing.assert_allclose(ours, numpy_pamr(maps, image, 10, dilations), atol=2e-5)


def test_pamr_of_many_classes_is_done_in_parts(monkeypatch):
    rng = np.random.default_rng(2)
    maps = rng.random((13, 17, 40)).astype(np.float32)
    image = rng.integers(0, 256, (13, 17, 3), np.uint8)
    whole = pamr(maps, image, steps=2, dilations=(1, 4))
    monkeypatch.setattr(labels_module, "FLOATS", 0)  # 16, 16, and the last 8 with 8 once more
    parts = pamr(maps, image, steps=2, dilations=(1, 4))
    np.testing.assert_allclose(parts, whole, rtol=1e-6)
