"""Eq. 1 and the background rule against plain NumPy, and what distractors are for."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.label_maps import label_map

from ovseg_jax.segmentation import readout
from ovseg_jax.segmentation.benchmarks import ScenesBenchmark
from ovseg_jax.segmentation.labels import label_maps
from ovseg_jax.segmentation.protocol import CHOICES, Protocol
from ovseg_jax.segmentation.scores import ImageScores
from ovseg_jax.segmentation.vocabulary import Vocabulary, competition
from ovseg_jax.train.config import load_config

B, K, E, C, GRID = 2, 4, 8, 5, (3, 6)
ORDERS = CHOICES["order"]


def a_case(seed=0):
    rng = np.random.default_rng(seed)
    logits = 3 * rng.normal(size=(B, GRID[0] * GRID[1], K))
    affinity = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    arrays = affinity, 5 * rng.normal(size=(B, K, E)), rng.normal(size=(C, E))
    return tuple(array.astype(np.float32) for array in arrays)


def numpy_scores(affinity, groups, text):
    groups = groups / np.linalg.norm(groups, axis=-1, keepdims=True)
    text = text / np.linalg.norm(text, axis=-1, keepdims=True)
    return (affinity @ groups @ text.T).reshape(B, *GRID, C)


def numpy_softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def numpy_upsample(maps, size):
    """Half-pixel bilinear, one pixel at a time."""
    h, w = maps.shape[1:3]
    out = np.zeros((len(maps), *size, maps.shape[-1]))
    for i in range(size[0]):
        for j in range(size[1]):
            y = min(max((i + 0.5) * h / size[0] - 0.5, 0), h - 1)
            x = min(max((j + 0.5) * w / size[1] - 0.5, 0), w - 1)
            a, b = int(y), int(x)
            c, d = min(a + 1, h - 1), min(b + 1, w - 1)
            fy, fx = y - a, x - b
            top = (1 - fx) * maps[:, a, b] + fx * maps[:, a, d]
            bottom = (1 - fx) * maps[:, c, b] + fx * maps[:, c, d]
            out[:, i, j] = (1 - fy) * top + fy * bottom
    return out


def test_class_scores():
    affinity, groups, text = a_case()
    scores = jax.jit(functools.partial(readout.class_scores, grid=GRID))(affinity, groups, text)
    np.testing.assert_allclose(scores, numpy_scores(affinity, groups, text), atol=1e-6)
    assert np.abs(scores).max() <= 1 + 1e-6
    # Lengths of groups and of text do not matter, and half precision comes out as f32.
    halves = readout.class_scores(jnp.bfloat16(affinity), jnp.bfloat16(2 * groups), 3 * text, GRID)
    assert halves.dtype == jnp.float32
    np.testing.assert_allclose(halves, scores, atol=2e-2)


def test_a_zero_group_gives_zero_not_nan():
    affinity, groups, text = a_case()
    scores = readout.class_scores(affinity, 0 * groups, text, GRID)
    np.testing.assert_array_equal(scores, 0)


@pytest.mark.parametrize("size", [(12, 24), (7, 11), (3, 6), (2, 3)])
def test_upsample_first(size):
    scores = numpy_scores(*a_case())
    p = readout.probabilities(scores, 10.0)
    expected = numpy_upsample(numpy_softmax(10 * scores), size)
    best, confidence = expected.argmax(-1), expected.max(-1)
    threshold = float(np.median(confidence)) + 1e-5
    labels = label_map(p, threshold, size)
    np.testing.assert_array_equal(labels, np.where(confidence < threshold, 0, best + 1))
    np.testing.assert_array_equal(label_map(p, None, size), best)
    np.testing.assert_array_equal(label_map(p, 0.0, size), best + 1)
    np.testing.assert_array_equal(label_map(p, 1.1, size), 0)


def test_argmax_first_repeats_the_labels_of_the_patches():
    p = readout.probabilities(numpy_scores(*a_case(1)), 10.0)
    threshold = float(np.median(p.max(-1))) + 1e-5
    cells = np.where(p.max(-1) < threshold, 0, p.argmax(-1) + 1)
    labels = label_map(p, threshold, (6, 18), "argmax_first")
    np.testing.assert_array_equal(labels, cells.repeat(2, 1).repeat(3, 2))
    plain = label_map(p, None, (6, 18), "argmax_first")
    np.testing.assert_array_equal(plain, np.asarray(p.argmax(-1)).repeat(2, 1).repeat(3, 2))


def test_the_orders_differ_between_patches():
    # Halfway between two patches of classes 0 and 1, a third class that is second in both can win.
    p = np.array([[[[0.5, 0.1, 0.4], [0.1, 0.5, 0.4]]]], np.float32)
    first, second = (label_map(p, None, (1, 8), order)[0, 0] for order in ORDERS)
    np.testing.assert_array_equal(second, [0] * 4 + [1] * 4)
    assert first[0] == 0 and first[-1] == 1 and 2 in first


# ---- distractors


def test_one_class_does_not_paint_what_a_distractor_matches_better():
    # The left patch looks like the class, the right one more like a distractor.
    text = np.eye(3, dtype=np.float32)
    groups = np.array([[[1, 0.2, 0], [0.6, 0.8, 0]]], np.float32)
    affinity = np.eye(2, dtype=np.float32)[None]
    both = readout.class_scores(affinity, groups, text, (1, 2))
    labels = label_map(readout.probabilities(both, 10.0), 0.0, (1, 2), word_to_class=(0, -1, -1))
    np.testing.assert_array_equal(labels, [[[1, 0]]])
    # Without distractors its probability is 1 everywhere, whatever the threshold.
    alone = readout.class_scores(affinity, groups, text[:1], (1, 2))
    labels = label_map(readout.probabilities(alone, 10.0), 0.99, (1, 2))
    np.testing.assert_array_equal(labels, [[[1, 1]]])


@pytest.mark.parametrize("words", [2, 7, 48, 1000])
def test_the_threshold_follows_longer_lists(words):
    # As the definition has it: the others' exponentials weighted as if there were N - 1 of them.
    protocol = Protocol(threshold=0.3, competing_words=48)
    logits = np.random.default_rng(words).normal(size=(2000, words)) * 3
    exponents = np.exp(logits)
    best, rest = exponents.max(-1), exponents.sum(-1) - exponents.max(-1)
    weight = 47 / (words - 1) if words > 48 else 1.0
    found = best / (best + rest) >= protocol.threshold_for(words)
    np.testing.assert_array_equal(found, best / (best + weight * rest) >= 0.3)
    assert Protocol(threshold=0.3).threshold_for(words) == 0.3
    assert protocol.replace(threshold=None).threshold_for(words) is None


def _labels(cells, image_cosines, protocol, word_to_class=None):
    """Labels of an image of a single window whose patches are its pixels."""
    h, w, words = cells.shape
    one = ImageScores(
        index=0,
        cells=cells,
        groups=np.zeros((h, w), np.int32),
        embeddings=np.asarray([[1.0, 0.0]], np.float32),
        group_cosines=np.zeros((1, 3, words), np.float32),
        image_cosines=image_cosines[None],
        size=(h, w),
        resized=(h, w),
        tiles=(1, 1),
        window=h,
        stride=h,
    )
    ((_, labels),) = label_maps([one], protocol, word_to_class)
    return labels


@pytest.mark.parametrize("image_scale", [0.0, 3.0])
@pytest.mark.parametrize("order", ORDERS)
def test_as_much_is_found_in_lists_of_any_length(order, image_scale):
    # A class that a third of the pixels show; all other words say nothing.
    rng = np.random.default_rng(0)
    cells = rng.normal(scale=0.1, size=(24, 24, 1000)).astype(np.float32)
    cells[8:16, :, 0] += 0.5
    image = rng.normal(scale=0.05, size=1000).astype(np.float32)
    image[0] += 0.2
    protocol = Protocol(
        scale=10.0, threshold=0.3, competing_words=48, image_scale=image_scale, order=order
    )
    shares = []
    for classes in (1, 7, 48, 1000):
        names = ["zebra", *(f"class {i}" for i in range(1, classes))]
        words = competition(Vocabulary.of(names), protocol)
        count = len(words.words)
        assert count == max(classes, 48)
        labels = _labels(cells[..., :count], image[:count], protocol, words.word_to_class)
        shares.append((labels == 1).mean())
    assert max(shares) - min(shares) < 0.03 and 0.28 < shares[0] < 0.34


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("words", [3, 60, 200])
def test_the_number_of_words_decides_what_is_background_not_which_word_wins(words, order):
    rng = np.random.default_rng(words)
    cells = rng.normal(scale=0.3, size=(12, 12, words)).astype(np.float32)
    image = rng.normal(scale=0.2, size=words).astype(np.float32)
    protocol = Protocol(scale=10.0, image_scale=2.0, threshold=0.25, order=order)
    best = _labels(cells, image, protocol.replace(threshold=0.0))
    areas = []
    for competing in (0, 2, 10, 48, 500):
        labels = _labels(cells, image, protocol.replace(competing_words=competing))
        np.testing.assert_array_equal(labels[labels > 0], best[labels > 0])
        areas.append((labels > 0).mean())
    # Where the threshold was chosen among fewer words, more of a longer list is found.
    assert areas[1] >= areas[2] >= areas[3] >= areas[4] == areas[0]
    assert words == 3 or areas[1] > areas[0]


def test_the_quickstart_says_how_many_words_its_threshold_was_chosen_among():
    config = load_config(Path(__file__).parents[2] / "configs" / "quickstart.py").eval
    scenes = ScenesBenchmark(**config.scenes.to_dict())
    assert config.protocol.competing_words == len(scenes.class_names)


def keys_of_a_subject(size=(8, 10), seed=0):
    """Keys of an image with one subject amid noisy ground, and where the subject is."""
    rng = np.random.default_rng(seed)
    subject = np.zeros(size, bool)
    subject[2:-2, 3:-2] = True
    keys = np.where(subject[..., None], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0])
    return (keys + rng.normal(0, 0.2, keys.shape)).astype(np.float32), subject


def test_what_resembles_the_border_is_surroundings():
    keys, subject = keys_of_a_subject()
    found = np.asarray(readout.foreground_log(keys, 2.0))
    assert found.shape == subject.shape and (found <= 0).all()
    np.testing.assert_array_equal(found > -1, subject)
    # The same in a mirror, of keys of any length, and in proportion to the scale.
    mirrored = np.asarray(readout.foreground_log(keys[:, ::-1] * 3, 4.0))[:, ::-1]
    np.testing.assert_allclose(mirrored, 2 * found, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 2), (4, 4)])
def test_an_image_without_contrast_is_surroundings_all_over(size):
    keys = np.ones((*size, 3), np.float32)
    np.testing.assert_allclose(readout.foreground_log(keys, 3.0), -3.0, atol=1e-5)
