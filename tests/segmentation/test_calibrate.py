"""Calibration against trying every setting the slow way."""

import dataclasses
import itertools

import numpy as np
import pytest
from ml_collections import ConfigDict
from segmentation.test_evaluate import PROTOCOL, Blocks, ByColor
from segmentation.test_readout import one_window

from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.calibrate import calibrate, calibrated, tune_split
from ovseg_jax.segmentation.evaluate import count_pixels, evaluate, mean_iou
from ovseg_jax.segmentation.labels import label_maps
from ovseg_jax.segmentation.protocol import CHOICES, Protocol

C = 4
SCALES, IMAGE_SCALES, THRESHOLDS = (2.0, 8.0, 30.0), (0.0, 4.0), (0.0, 0.3, 0.45, 0.6, 0.9)


def scored(count, size=(9, 12), seed=0, labels=C + 1):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        cells = rng.uniform(-0.3, 0.5, (3, 4, C)).astype(np.float32)
        truth = rng.integers(0, labels, size).astype(np.uint8)
        truth[rng.random(size) < 0.1] = 255
        one = one_window(cells, size, rng.uniform(-0.3, 0.5, C))
        yield dataclasses.replace(one, truth=truth)


@pytest.mark.parametrize("cap", [False, True])
@pytest.mark.parametrize("word_to_class", [None, (0, 1, 1, -1)], ids=["classes", "synonyms"])
@pytest.mark.parametrize("order", CHOICES["order"])
def test_brute_force(order, word_to_class, cap):
    count = C + 1 if word_to_class is None else 3
    # Two sizes, so that batches break off; seven images in batches of four, so that one is padded.
    # Flat scores: no pixel of most images reaches the upper thresholds. What the border of the
    # image says is part of the scores, and differs from cell to cell.
    rng, images = np.random.default_rng(2), []
    for one in (*scored(7, labels=count), *scored(2, (5, 6), seed=1, labels=count)):
        foreground = -rng.random(one.cells.shape, np.float32)
        images.append(dataclasses.replace(one, cells=one.cells / 2, foreground=foreground))
    protocol = Protocol(order=order, cap_threshold=cap)
    pairs = list(itertools.product(SCALES, IMAGE_SCALES))
    expected = np.zeros((len(pairs), len(THRESHOLDS)))
    for (i, pair), (j, threshold) in itertools.product(enumerate(pairs), enumerate(THRESHOLDS)):
        fields = dict(zip(("scale", "image_scale", "threshold"), (*pair, threshold), strict=True))
        labeled = label_maps(images, protocol.replace(**fields), word_to_class)
        expected[i, j] = mean_iou(sum(count_pixels(x, one.truth, count) for one, x in labeled))
    settings = protocol, SCALES, IMAGE_SCALES, THRESHOLDS
    best, curves = calibrate(iter(images), *settings, batch_size=4, word_to_class=word_to_class)
    np.testing.assert_allclose(curves, expected, atol=1e-12)
    i, j = np.unravel_index(expected.argmax(), expected.shape)
    assert (best.scale, best.image_scale, best.threshold) == (*pairs[i], THRESHOLDS[j])


@pytest.mark.parametrize("cap", [False, True])
def test_a_benchmark_is_calibrated_as_it_is_evaluated(cap):
    tune, protocol = Blocks(((24, 24), (24, 40))), PROTOCOL.replace(cap_threshold=cap)
    chosen, miou = calibrated(ByColor(2), tune, protocol, 2)
    assert chosen.competing_words == 3 and chosen.cap_threshold == cap
    result = evaluate(ByColor(2), tune, chosen, batch_size=2)
    assert result["miou"] == pytest.approx(miou, abs=1e-4)
    # Nothing is chosen where pixels have one group: it is only measured.
    fields = {"grouping": "one_group", "image_classes": 2}
    chosen, miou = calibrated(ByColor(2), tune, protocol.replace(**fields), 2)
    assert chosen == protocol.replace(**fields) and 0 < miou <= 100


def test_bad_input():
    with pytest.raises(UserError, match="at least one image"):
        calibrate([], Protocol())
    scores = next(scored(1))
    for label, said in ((9, "true label 9"), (255, "no pixel")):
        with pytest.raises(UserError, match=said):
            calibrate([dataclasses.replace(scores, truth=scores.truth * 0 + label)], Protocol())


def test_without_a_background_there_is_no_threshold_to_choose():
    """Their labels are not 1 + class, as calibration counts them."""
    names = ("voc", "voc20", "context59", "ade20k", "voc_zss", "folder")
    fields = {name: {"dir": "nowhere", "count": 0} for name in names}
    config = ConfigDict({"calibrate": True, "tune_count": 4, **fields})
    assert [tune_split(name, config) for name in names[1:]] == [None] * 5
    with pytest.raises(UserError, match="nowhere"):
        tune_split("voc", config)
