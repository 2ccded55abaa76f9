"""Calibration against trying every setting the slow way."""

import dataclasses
import itertools

import numpy as np
import pytest
from ml_collections import ConfigDict
from reference.label_maps import label_map
from segmentation.test_evaluate import PROTOCOL, Blocks, ByColor

from ovseg_jax.errors import UserError
from ovseg_jax.segmentation import calibrate as calibration
from ovseg_jax.segmentation.calibrate import calibrate, tune_split
from ovseg_jax.segmentation.labels import label_maps
from ovseg_jax.segmentation.metric import ConfusionMatrix
from ovseg_jax.segmentation.protocol import CHOICES, Protocol
from ovseg_jax.segmentation.readout import downweight_by_image_score, probabilities
from ovseg_jax.segmentation.scores import ImageScores

C = 4
ORDERS = CHOICES["order"]
SCALES = (2.0, 8.0, 30.0)
IMAGE_SCALES = (0.0, 4.0)
THRESHOLDS = (0.0, 0.3, 0.45, 0.6, 0.9)


def one_window(cells, size, image_cosines=(0.0,) * C):
    return ImageScores(
        index=0,
        cells=cells,
        groups=np.zeros(cells.shape[:2], np.int32),
        embeddings=np.asarray([[1.0, 0.0]], np.float32),
        group_cosines=np.zeros((1, 3, cells.shape[2]), np.float32),
        image_cosines=np.asarray([image_cosines], np.float32),
        size=size,
        resized=size,
        tiles=(1, 1),
        window=max(size),
        stride=max(size),
    )


def scored(count, size=(9, 12), seed=0, labels=C + 1):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        cells = rng.uniform(-0.3, 0.5, (3, 4, C)).astype(np.float32)
        truth = rng.integers(0, labels, size).astype(np.uint8)
        truth[rng.random(size) < 0.1] = 255
        yield one_window(cells, size, rng.uniform(-0.3, 0.5, C)), truth


@pytest.mark.parametrize("word_to_class", [None, (0, 1, 1, -1)], ids=["classes", "synonyms"])
@pytest.mark.parametrize("order", ORDERS)
def test_brute_force(order, word_to_class):
    labels_count = C + 1 if word_to_class is None else 3
    # Two sizes, so that batches break off; seven images in batches of four, so that one is padded.
    images = [*scored(7, labels=labels_count), *scored(2, (5, 6), seed=1, labels=labels_count)]
    pairs = list(itertools.product(SCALES, IMAGE_SCALES))
    expected = np.zeros((len(pairs), len(THRESHOLDS)))
    for i, (scale, image_scale) in enumerate(pairs):
        for j, threshold in enumerate(THRESHOLDS):
            matrix = ConfusionMatrix.empty(labels_count)
            for scores, truth in images:
                p = probabilities(scores.cells[None], scale)
                margins = scores.image_cosines - scores.image_cosines.max()
                p = downweight_by_image_score(p, margins[None, None], image_scale)
                labels = label_map(p, threshold, truth.shape, order, word_to_class=word_to_class)
                matrix.update(np.asarray(labels[0]), truth)
            expected[i, j] = matrix.miou()
    settings = Protocol(order=order), SCALES, IMAGE_SCALES, THRESHOLDS
    found = calibrate(iter(images), *settings, batch_size=4, word_to_class=word_to_class)
    np.testing.assert_allclose(found.curves, expected, atol=1e-12)
    i, j = np.unravel_index(expected.argmax(), expected.shape)
    assert (found.scale, found.image_scale) == pairs[i]
    assert found.threshold == THRESHOLDS[j]
    assert found.miou == pytest.approx(expected.max())


@pytest.mark.parametrize("cap", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_each_threshold_is_judged_by_the_labels_that_it_gives(order, cap):
    images = [*scored(3), *scored(2, (5, 6), seed=1)]
    # Flat scores: no pixel of most images reaches the upper thresholds.
    images = [(dataclasses.replace(one, cells=one.cells / 4), truth) for one, truth in images]
    # What the border of the image says is part of the scores, and differs from cell to cell.
    rng = np.random.default_rng(2)
    images = [
        (dataclasses.replace(one, foreground=-rng.random(one.cells.shape, np.float32)), truth)
        for one, truth in images
    ]
    protocol = Protocol(scale=SCALES[1], image_scale=4.0, order=order, cap_threshold=cap)
    settings = (protocol.scale,), (protocol.image_scale,), THRESHOLDS
    found = calibrate(iter(images), protocol, *settings, batch_size=2)
    expected = []
    for threshold in THRESHOLDS:
        matrix = ConfusionMatrix.empty(C + 1)
        labeled = label_maps([one for one, _ in images], protocol.replace(threshold=threshold))
        for (_, labels), (_, truth) in zip(labeled, images, strict=True):
            matrix.update(labels, truth)
        expected.append(matrix.miou())
    np.testing.assert_allclose(found.curves[0], expected, atol=1e-12)


def test_calibration_follows_its_protocol(monkeypatch):
    asked = []

    def recorded(pairs, protocol, **options):
        asked.append(protocol.cap_threshold)
        return calibrate(pairs, protocol, **options)

    monkeypatch.setattr(calibration, "calibrate", recorded)
    for cap in (False, True):
        protocol = PROTOCOL.replace(cap_threshold=cap)
        calibration.calibrated(ByColor(2), Blocks(((24, 24),)), protocol, 2)
    assert asked == [False, True]


def test_finds_the_threshold_that_separates():
    # Object cells have a clear best class, background cells have none.
    cells = np.zeros((2, 2, C), np.float32)
    cells[0, :, 1] = 0.9
    truth = np.zeros((8, 8), np.uint8)
    truth[:4] = 2
    found = calibrate([(one_window(cells, (8, 8)), truth)], Protocol(order="argmax_first"))
    assert found.miou == pytest.approx(1.0)
    labels = label_map(
        probabilities(cells[None], found.scale), found.threshold, (8, 8), "argmax_first"
    )
    np.testing.assert_array_equal(labels[0], truth)


def test_bad_input():
    with pytest.raises(UserError, match="at least one image"):
        calibrate([], Protocol())
    scores, truth = next(scored(1))
    with pytest.raises(UserError, match="true label 9"):
        calibrate([(scores, np.full_like(truth, 9))], Protocol())
    with pytest.raises(UserError, match="no pixel"):
        calibrate([(scores, np.full_like(truth, 255))], Protocol())


@pytest.mark.parametrize("name", ["voc20", "context59", "ade20k"])
def test_without_a_background_there_is_no_threshold_to_choose(name):
    """Their labels are not 1 + class, as calibration counts them."""
    config = ConfigDict({"calibrate": True, "tune_count": 4, name: {"dir": "nowhere", "count": 0}})
    assert tune_split(name, config) is None
    with pytest.raises(UserError, match="nowhere"):
        tune_split("voc", ConfigDict({**config.to_dict(), "voc": {"dir": "nowhere", "count": 0}}))
