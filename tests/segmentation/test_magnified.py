"""Labels of large images, against scoring every pixel."""

import numpy as np
import pytest

from ovseg_jax.segmentation import labels as labels_module
from ovseg_jax.segmentation import magnified
from ovseg_jax.segmentation.labels import label_maps
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.segmentation.scores import image_scores

PATCH, K, W, E = 4, 5, 6, 7
PROTOCOL = Protocol(short_side=20, long_limit=48, window=20, stride=8, scale=6.0, threshold=0.26)
SIZES = ((97, 128), (61, 203), (300, 44), (90, 90))
OWNERS = (0, 0, 1, 2, -1, -1)
FORMS = {
    "threshold": {},
    "no background": {"threshold": None},
    "the image's word": {"image_scale": 0.5},
    "argmax first": {"order": "argmax_first"},
    "softmax last": {"averaged": "cosines"},
    "softmax last, no background": {"averaged": "cosines", "threshold": None},
    "flip and colors": {"flip": True, "pamr_steps": 2, "pamr_dilations": (1, 2)},
    "softmax last, scales": {"averaged": "cosines", "scales": (1.0, 1.4)},
    "large classes alone": {"min_area": 0.2},
    "large classes alone, softmax last": {"min_area": 0.2, "averaged": "cosines"},
    "one group": {"grouping": "one_group", "image_classes": 3, "threshold": 0.1},
    "one group, no background": {"grouping": "one_group", "threshold": None},
}


def encode(images, index):
    """Each window's groups and soft maps are its own, whatever it shows."""
    rng = np.random.default_rng(int(images.astype(np.int64).sum() % 1000))
    b, h, w, _ = images.shape
    logits = rng.normal(size=(b, (h // PATCH) * (w // PATCH), K)) * 2
    affinity = np.exp(logits)
    affinity /= affinity.sum(-1, keepdims=True)
    groups, embedding = rng.normal(size=(b, K, E)), rng.normal(size=(b, E))
    return tuple(x.astype(np.float32) for x in (affinity, groups, embedding))


def found(protocol, owners):
    rng = np.random.default_rng(0)
    images = (rng.integers(0, 256, (*size, 3), np.uint8) for size in SIZES)
    text = np.random.default_rng(1).normal(size=(W, E)).astype(np.float32)
    scored = image_scores(encode, text, images, protocol, 1)
    return {one.index: labels for one, labels in label_maps(scored, protocol, owners)}


@pytest.mark.parametrize("owners", [None, OWNERS], ids=["classes", "synonyms"])
@pytest.mark.parametrize("form", FORMS)
def test_labels_are_those_of_scoring_every_pixel(form, owners, monkeypatch):
    protocol = PROTOCOL.replace(**FORMS[form])
    if owners and protocol.threshold is None:
        owners = (0, 0, 1, 2, 3, 3)
    everywhere = found(protocol, owners)
    bordering, settled, judged = magnified._bordering, [], magnified._judged
    scored = []

    def judge(*args, **options):
        label, agreed = judged(*args, **options)
        settled.append(int(agreed.sum()))
        return label, agreed

    def border(*args, **options):
        scored.append(True)
        return bordering(*args, **options)

    monkeypatch.setattr(magnified, "FLOATS", 0)
    monkeypatch.setattr(magnified, "_judged", judge)
    monkeypatch.setattr(magnified, "_bordering", border)
    # A few rows, and a few blocks, at a time.
    monkeypatch.setattr(labels_module, "BAND_FLOATS", 2_500)
    monkeypatch.setattr(magnified, "BORDER_FLOATS", 5_000)
    for index, labels in found(protocol, owners).items():
        assert labels.dtype == everywhere[index].dtype
        # Scores that agree to seven digits may round either way.
        assert (labels != everywhere[index]).sum() <= 1
        assert len(np.unique(labels)) > 1
    if protocol.order == "argmax_first":
        assert not settled  # nearest neighbors need no scores
    else:
        assert sum(settled) > 0 and scored and len(settled) > len(SIZES)


@pytest.mark.parametrize(("pixels", "cells"), [(50, 7), (9, 9), (101, 20), (13, 12), (64, 1)])
def test_pixels_between_cells(pixels, cells):
    axis = magnified._Axis(pixels, cells)
    numbers, inside = axis.pixels(np.arange(cells))
    np.testing.assert_array_equal(numbers[inside], np.arange(pixels))
    center = (np.arange(pixels) + 0.5) * cells / pixels - 0.5
    low = np.repeat(np.arange(cells), inside.sum(1))
    np.testing.assert_allclose(
        low + axis.parts[inside], np.clip(center, 0, cells - 1), rtol=1e-6, atol=1e-6
    )


def test_small_images_are_scored_pixel_by_pixel():
    assert magnified.worth_it((3000, 4000), (448, 597), 20)
    assert not magnified.worth_it((375, 500), (448, 597), 500)
    assert not magnified.worth_it((600, 800), (140, 187), 10)
