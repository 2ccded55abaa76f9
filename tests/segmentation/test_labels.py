"""Label maps of whole images of any size against plain NumPy, window by window."""

import itertools

import numpy as np
import pytest
from reference import one_group as reference

from ovseg_jax.errors import UserError
from ovseg_jax.segmentation import labels as labels_module
from ovseg_jax.segmentation import readout
from ovseg_jax.segmentation.labels import DILATIONS, class_probabilities, label_maps, pamr
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.segmentation.scores import image_scores, with_scale
from ovseg_jax.segmentation.vocabulary import Vocabulary

K, C, E, PATCH = 5, 7, 6, 4
WORDS = Vocabulary.of(list("abcdefg"))
SOFT = Protocol(short_side=24, long_limit=64, window=24, stride=12, scale=6.0, threshold=0.3)
FIELDS = {"grouping": "one_group", "image_classes": 3, "cap_threshold": True}
ONE_GROUP = SOFT.replace(scale=12.0, threshold=0.5, **FIELDS)
SIZES = ((24, 24), (24, 40), (50, 24), (90, 130), (12, 200), (7, 5), (24, 40))


class Random:
    """A segmenter whose maps are smooth random functions of the mean color of the patches."""

    def __init__(self, keys=False):
        rng, self.keys = np.random.default_rng(0), keys
        self.color, self.groups = rng.normal(size=(3, K)), rng.normal(size=(K, E))
        self.class_text = rng.normal(size=(C, E)).astype(np.float32)

    def encode(self, images):
        b, h, w, _ = images.shape
        h, w = h // PATCH, w // PATCH
        cells = images[:, : h * PATCH, : w * PATCH].reshape(b, h, PATCH, w, PATCH, 3)
        color = cells.mean((2, 4)).reshape(b, h * w, 3) / 64 - 2
        logits = np.exp(color @ self.color)
        groups = self.groups + color.mean(1)[:, :1, None]
        arrays = logits / logits.sum(-1, keepdims=True), groups, groups.mean(1), color
        return tuple(x.astype(np.float32) for x in arrays[: 3 + self.keys])

    def text(self, names, templates):
        return (self.class_text[: len(names)],) * 2

    def scale(self):
        return 12.0


def pictures():
    for index, size in enumerate(SIZES):
        coarse = np.random.default_rng(index).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        yield readout.resize_image(coarse, *size)


def scored(protocol, images=None):
    segmenter = Random(keys=protocol.border_scale > 0)
    return image_scores(segmenter, WORDS, images or pictures(), protocol, 4)


def found(protocol, **options):
    pairs = label_maps(scored(protocol), protocol, **options)
    labels = {scores.index: labels for scores, labels in pairs}
    assert sorted(labels) == list(range(len(SIZES)))
    return [labels[index] for index in range(len(SIZES))]


def assert_by_the_book(labels, protocol, book, least=1e-5):
    for image, ours in zip(pictures(), labels, strict=True):
        expected, margin = book(image, protocol)
        assert ours.shape == image.shape[:2]
        clear = margin > least
        np.testing.assert_array_equal(ours[clear], expected[clear])
        # Votes of few windows are often equal.
        assert clear.mean() > (0.5 if protocol.order == "argmax_first" else 0.99)


# ---- by the book


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax(x):
    exponents = np.exp(x - x.max(-1, keepdims=True))
    return exponents / exponents.sum(-1, keepdims=True)


def upsample(maps, size):
    rows, columns = (readout.bilinear_weights(n, m) for n, m in zip(size, maps.shape, strict=False))
    return np.einsum("Hh,hwc,Ww->HWc", rows.astype(np.float64), maps, columns.astype(np.float64))


def nearest(maps, size):
    sides = zip(size, maps.shape, strict=False)
    rows, columns = ((2 * np.arange(n) + 1) * m // (2 * n) for n, m in sides)
    return maps[rows][:, columns]


def windows_of(image, protocol):
    """The resized image, and (corner, window, what the segmenter gives for it) of its windows."""
    resized = readout.resized_shape(*image.shape[:2], protocol.short_side, protocol.long_limit)
    image, side = readout.resize_image(image, *resized), protocol.window
    corners = readout.window_grid(*resized, side, protocol.stride)
    parts = [image[top : top + side, left : left + side] for top, left in corners]
    encoded = [Random(keys=True).encode(part[None]) for part in parts]
    encoded = [[x[0].astype(np.float64) for x in arrays] for arrays in encoded]
    return image, list(zip(corners, parts, encoded, strict=True))


def soft_patches(image, protocol):
    """Windows, upsampled one by one, averaged, refined, resized; labels and how clear they are."""
    seen, windows = windows_of(image, protocol)
    text = unit(Random().class_text.astype(np.float64))
    late = protocol.averaged == "cosines"
    image_cosine = unit(np.mean([unit(embedding) for *_, (_, _, embedding, _) in windows], 0))
    margin = image_cosine @ text.T - (image_cosine @ text.T).max()
    likeness, votes = plain_likeness(windows), protocol.order == "argmax_first"
    total, cover = np.zeros((*seen.shape[:2], C + votes)), np.zeros((*seen.shape[:2], 1))
    for (top, left), part, (affinity, groups, *_) in windows:
        h, w = part.shape[0] // PATCH, part.shape[1] // PATCH
        scores = (affinity @ (unit(groups) @ text.T)).reshape(h, w, C)
        if not late:
            scores = softmax(protocol.scale * scores) * np.exp(protocol.image_scale * margin)
            scores *= np.exp(-protocol.border_scale * likeness[top, left])[..., None]
        place = (slice(top, top + part.shape[0]), slice(left, left + part.shape[1]))
        if votes:
            best = np.where(scores.max(-1) < protocol.threshold, 0, scores.argmax(-1) + 1)
            total[place] += nearest(np.eye(C + 1)[best], part.shape[:2])
        else:
            total[place] += upsample(scores, part.shape[:2])
        cover[place] += 1
    maps = total / cover
    if votes:
        p = nearest(maps, image.shape[:2])
        best = np.sort(p, -1)
        return p.argmax(-1), best[..., -1] - best[..., -2]
    if protocol.pamr_steps:
        maps = plain_pamr(maps, seen, protocol.pamr_steps)
    p = upsample(maps, image.shape[:2])
    p = softmax(protocol.scale * p) if late else p
    if protocol.min_area:
        areas = np.bincount(p.argmax(-1).ravel(), minlength=C)
        p = p * (areas > protocol.min_area * areas.sum())
    best = np.sort(p, -1)
    clear = np.minimum(best[..., -1] - best[..., -2], np.abs(best[..., -1] - protocol.threshold))
    return np.where(p.max(-1) < protocol.threshold, 0, p.argmax(-1) + 1), clear


def plain_likeness(windows):
    """How much each cell resembles the border of the image, 0 to 1, by window corner."""
    corners = [corner for corner, *_ in windows]
    tops, lefts = ([*dict.fromkeys(c[axis] for c in corners)] for axis in (0, 1))
    # At the image's border lie the outer cells of the outer windows.
    cells, border = {}, []
    for (top, left), part, (*_, key) in windows:
        h, w = part.shape[0] // PATCH, part.shape[1] // PATCH
        cells[top, left] = key = unit(key).reshape(h, w, -1)
        for i, j in itertools.product(range(h), range(w)):
            rows = (top == tops[0] and i == 0) or (top == tops[-1] and i == h - 1)
            columns = (left == lefts[0] and j == 0) or (left == lefts[-1] and j == w - 1)
            if rows or columns:
                border.append(key[i, j])
    mean = unit(np.mean(border, axis=0))
    return {corner: np.maximum(key @ mean, 0) for corner, key in cells.items()}


def plain_pamr(maps, image, steps):
    h, w, _ = maps.shape
    ys, xs = np.mgrid[:h, :w]
    offsets = list(itertools.product(DILATIONS, (-1, 0, 1), (-1, 0, 1)))

    def values(x):
        shifted = ((ys + d * i, xs + d * j) for d, i, j in offsets)
        return np.stack([x[np.clip(y, 0, h - 1), np.clip(x_, 0, w - 1)] for y, x_ in shifted])

    around = np.array([(i, j) != (0, 0) for _, i, j in offsets])
    everywhere, image = values(image / 255.0), image / 255.0
    unit = 0.1 * everywhere.std(0, ddof=1) + 1e-8
    distance = (np.abs(everywhere[around] - image) / unit).mean(-1)
    weights = softmax(-distance.T).T
    for _ in range(steps):
        maps = (values(maps)[around] * weights[..., None]).sum(0)
    return maps


def one_group(image, protocol):
    text = unit(Random().class_text.astype(np.float64))
    seen, windows = windows_of(image, protocol)
    parts = []
    for _, part, (soft, groups, embedding, _) in windows:
        soft = soft.reshape(part.shape[0] // PATCH, part.shape[1] // PATCH, K)
        cosines = unit(groups) @ text.T, unit(embedding) @ text.T
        rule = protocol.scale, protocol.threshold, protocol.image_classes, protocol.cap_threshold
        parts.append(reference.window_scores(soft, *cosines, part.shape[:2], *rule))
    corners = [corner for corner, *_ in windows]
    return reference.labels(parts, corners, seen.shape[:2], image.shape[:2])


# ---- against the book

OPTIONS = {
    "none": {},
    "image": {"image_scale": 2.0},
    "border": {"image_scale": 2.0, "border_scale": 1.5},
    "pamr": {"pamr_steps": 3},
    "votes": {"order": "argmax_first", "image_scale": 2.0},
    "cosines": {"averaged": "cosines"},
    "large classes alone": {"min_area": 0.35},
    "large classes alone, refined": {"min_area": 0.2, "averaged": "cosines", "pamr_steps": 1},
}


@pytest.fixture(scope="module")
def plain():
    return found(SOFT, group=3)


@pytest.mark.parametrize("name", OPTIONS)
def test_soft_patches(monkeypatch, plain, name):
    if name != "none":
        monkeypatch.setattr(labels_module, "BAND_FLOATS", 2000)
    protocol = SOFT.replace(**OPTIONS[name])
    labels = found(protocol, group=3)
    assert_by_the_book(labels, protocol, soft_patches, least=1e-4 if "pamr" in name else 1e-5)
    assert any((a != b).any() for a, b in zip(labels, plain, strict=True)) == (name != "none")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"threshold": None},
        {"threshold": 0.2, "cap_threshold": False, "image_classes": 0},
        {"threshold": 2.0, "image_classes": 20},
    ],
)
def test_one_group(monkeypatch, changes):
    if changes:
        monkeypatch.setattr(labels_module, "BAND_FLOATS", 9000)
    protocol = ONE_GROUP.replace(**changes)
    labels = found(protocol, group=3)
    assert_by_the_book(labels, protocol, one_group)
    assert len(set(np.concatenate([x.ravel() for x in labels]))) > 2


def test_pamr_of_many_classes_is_done_in_parts(monkeypatch):
    rng = np.random.default_rng(2)
    maps = rng.random((13, 17, 40)).astype(np.float32)
    image = rng.integers(0, 256, (13, 17, 3), np.uint8)
    image[:5] = 90  # a flat part, where nothing deviates
    monkeypatch.setattr(labels_module, "FLOATS", 0)  # 16, 16, and the last 8 with 8 once more
    ours = pamr(maps, image, steps=10)
    np.testing.assert_allclose(ours, plain_pamr(maps, image, 10), atol=2e-5)


@pytest.mark.parametrize("protocol", [SOFT, ONE_GROUP], ids=["soft", "one_group"])
def test_distractors_are_background(protocol):
    protocol = protocol.replace(threshold=0.0)
    few_of = (0, 1, 2, *[-1] * (C - 3))
    every, few = found(protocol), found(protocol, word_to_class=few_of)
    for labels, with_few in zip(every, few, strict=True):
        np.testing.assert_array_equal(with_few, np.where(labels > 3, 0, labels))
    assert any((labels > 3).any() for labels in every)
    with pytest.raises(UserError, match="background"):
        found(protocol.replace(threshold=None), word_to_class=few_of)


@pytest.mark.parametrize("order", ["argmax_first", "upsample_first"])
def test_a_capped_threshold_leaves_the_best_pixels(monkeypatch, order):
    monkeypatch.setattr(labels_module, "BAND_FLOATS", 2000)
    capped = SOFT.replace(order=order, scale=1.0, threshold=0.9, cap_threshold=True)

    def labels(**changes):
        return found(capped.replace(**changes), group=1)

    plain, with_cap = labels(cap_threshold=False), labels()
    triples = zip(plain, with_cap, labels(threshold=0.0), strict=True)
    for index, (none, some, best) in enumerate(triples):
        # Where windows overlap, the best cell may be outvoted.
        assert not none.any() and (some.any() or (index > 0 and order == "argmax_first"))
        np.testing.assert_array_equal(some[some > 0], best[some > 0])
    # A threshold that some pixel reaches is left alone.
    low = labels(threshold=0.1), labels(threshold=0.1, cap_threshold=False)
    for a, b in zip(*low, strict=True):
        np.testing.assert_array_equal(a, b)


# ---- scores


def test_scores_and_groups_of_one_image():
    image = list(pictures())[1]
    (one,) = scored(ONE_GROUP, [image])
    p = class_probabilities(one, ONE_GROUP)
    assert p.shape == (3, K, C) and ((p > 0).sum(-1) == ONE_GROUP.image_classes).all()
    (soft,) = scored(SOFT, [image])
    np.testing.assert_allclose(class_probabilities(soft, SOFT).sum(-1), 1, rtol=1e-5)
    assert (soft.tiles, soft.cells.shape) == ((1, 3), (6, 18, C))  # starts 0, 12, 16
    best = Random().encode(image[None, :, :24])[0][0].argmax(-1).reshape(6, 6)
    np.testing.assert_array_equal(one.group_map()[2::4, 2:22:4], best[:, :5])


def test_an_open_scale_is_the_models_own():
    assert with_scale(ONE_GROUP.replace(scale=None), Random()) == ONE_GROUP
    assert with_scale(ONE_GROUP.replace(scale=3.0), Random()).scale == 3.0
