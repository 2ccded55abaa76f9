"""The confusion matrix against brute force, and an evaluation that processes share."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from segmentation.test_evaluate import PROTOCOL, SIZES, Blocks, ByColor

from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.evaluate import evaluate
from ovseg_jax.segmentation.metric import ConfusionMatrix, Counts

CLASSES = 6


def maps(seed, shape=(3, 7, 5), classes=CLASSES):
    """Prediction and truth; the truth has ignored pixels, and classes may be absent."""
    rng = np.random.default_rng(seed)
    prediction = rng.integers(0, rng.integers(1, classes + 1), shape).astype(np.uint8)
    truth = rng.integers(0, rng.integers(1, classes + 1), shape).astype(np.uint8)
    truth[rng.random(shape) < 0.2] = 255
    return prediction, truth


def count(*pairs):
    matrix = ConfusionMatrix.empty(CLASSES)
    for prediction, truth in pairs:
        matrix.update(prediction, truth)
    return matrix


seeds = st.integers(0, 10**6)


@settings(deadline=None, max_examples=40)
@given(seeds)
def test_brute_force(seed):
    prediction, truth = maps(seed)
    matrix, valid = count((prediction, truth)), truth != 255
    ious, accuracies, weighted = [], [], 0.0
    for c in range(CLASSES):
        p, t = (prediction == c) & valid, (truth == c) & valid
        union = (p | t).sum()
        ious.append((p & t).sum() / union if union else np.nan)
        if t.any():
            accuracies.append((p & t).sum() / t.sum())
            weighted += t.sum() / valid.sum() * ious[-1]
    np.testing.assert_allclose(matrix.iou(), ious, rtol=1e-12)
    assert matrix.miou() == pytest.approx(np.nanmean(ious), abs=1e-12)
    assert matrix.pixel_accuracy() == pytest.approx((prediction == truth)[valid].mean(), abs=1e-12)
    assert matrix.mean_accuracy() == pytest.approx(np.mean(accuracies), abs=1e-12)
    assert matrix.frequency_weighted_iou() == pytest.approx(weighted, abs=1e-12)
    background = count((np.zeros_like(prediction), truth))
    np.testing.assert_array_equal(matrix.all_background().counts, background.counts)


@settings(deadline=None, max_examples=40)
@given(seeds, seeds, seeds)
def test_merging_is_counting_together(a, b, c):
    a, b, c = maps(a), maps(b), maps(c)
    together = count(a, b, c).counts
    np.testing.assert_array_equal((count(a) + (count(c) + count(b))).counts, together)
    joined = tuple(np.concatenate(parts) for parts in zip(a, b, c, strict=True))
    np.testing.assert_array_equal(count(joined).counts, together)
    np.testing.assert_array_equal((count(a) + count()).counts, count(a).counts)


@settings(deadline=None, max_examples=30)
@given(seeds, st.permutations(range(CLASSES)))
def test_renaming_classes_permutes_iou(seed, order):
    prediction, truth = maps(seed)
    rename = np.full(256, 255, np.uint8)
    rename[:CLASSES] = order
    plain, renamed = count((prediction, truth)), count((rename[prediction], rename[truth]))
    np.testing.assert_array_equal(renamed.iou()[list(order)], plain.iou())
    assert renamed.miou() == pytest.approx(plain.miou(), abs=1e-12)


def test_one_worked_example():
    # Class 3 is neither drawn nor predicted: left out. Class 2 is predicted only: counts as zero.
    prediction = np.array([[0, 1, 1], [2, 0, 1]], np.int64)
    truth = np.array([[0, 1, 0], [0, 255, 1]], np.uint8)
    matrix = ConfusionMatrix.empty(4).update(prediction, truth)
    np.testing.assert_allclose(matrix.iou(), [1 / 3, 2 / 3, 0, np.nan])
    assert matrix.miou() == pytest.approx(1 / 3)
    assert matrix.miou([0, 1]) == pytest.approx(0.5)
    assert np.isnan(matrix.miou([3])) and np.isnan(matrix.miou([]))
    assert matrix.pixel_accuracy() == pytest.approx(3 / 5)
    assert matrix.counts.dtype == np.int64


def test_nothing_counted_is_nan_without_a_warning():
    matrix = ConfusionMatrix.empty(2)
    for value in (matrix.miou(), matrix.pixel_accuracy(), matrix.mean_accuracy()):
        assert np.isnan(value)
    assert np.isnan(matrix.frequency_weighted_iou())


def test_refuses_what_cannot_be_counted():
    matrix, map_ = ConfusionMatrix.empty(3), np.zeros((2, 2), np.uint8)
    with pytest.raises(UserError, match="shape"):
        matrix.update(map_, np.zeros((2, 3), np.uint8))
    with pytest.raises(UserError, match="truth has labels 0..3"):
        matrix.update(map_, np.array([[0, 3], [0, 0]], np.uint8))
    with pytest.raises(UserError, match="prediction has labels -1..0"):
        matrix.update(np.array([[0, -1], [0, 0]], np.int32), map_)
    with pytest.raises(UserError, match="cannot add"):
        matrix + ConfusionMatrix.empty(2)
    assert not matrix.counts.any()
    # A strange prediction where the truth is ignored does not matter.
    matrix.update(np.array([[255]], np.uint8), np.array([[255]], np.uint8))


def published_measures(predictions, truths, classes, ignore=255):
    """The measures of mmsegmentation, by its published formula: for each image histograms of
    intersection, prediction and truth; summed; then IoU, Acc, mIoU, mAcc and aAcc."""
    totals = np.zeros((3, classes))
    for prediction, truth in zip(predictions, truths, strict=True):
        valid = truth != ignore
        p, t = prediction[valid], truth[valid]
        for row, values in enumerate((p[p == t], p, t)):
            totals[row] += np.histogram(values, bins=classes, range=(0, classes - 1))[0]
    intersect, area_p, area_t = totals
    with np.errstate(invalid="ignore"):
        iou, accuracy = intersect / (area_p + area_t - intersect), intersect / area_t
    return {
        "iou": iou,
        "miou": np.nanmean(iou),
        "mean_accuracy": np.nanmean(accuracy),
        "pixel_accuracy": intersect.sum() / area_t.sum(),
    }


@settings(deadline=None, max_examples=40)
@given(st.lists(seeds, min_size=1, max_size=4), st.sampled_from([2, 21, 60, 150]))
def test_published_formula(list_of_seeds, classes):
    """With ignored pixels, classes that are absent, and classes that are never predicted."""
    pairs = [maps(seed, classes=classes) for seed in list_of_seeds]
    matrix = ConfusionMatrix.empty(classes)
    for prediction, truth in pairs:
        matrix.update(prediction, truth)
    expected = published_measures(*zip(*pairs, strict=True), classes)
    np.testing.assert_allclose(matrix.iou(), expected["iou"], rtol=0, atol=1e-12)
    for name in ("miou", "mean_accuracy", "pixel_accuracy"):
        assert abs(getattr(matrix, name)() - expected[name]) < 1e-12


# ---- several processes

ROOT = Path(__file__).parents[2]
TIMES = ("seconds", "images_per_second")

# A process of a job: it evaluates its part, and prints the whole result.
PROCESS = """
import json, sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
from ovseg_jax.segmentation.evaluate import evaluate
from ovseg_jax.segmentation.metric import gather_counts, this_part
from segmentation.test_evaluate import PROTOCOL, SIZES, Blocks, ByColor
options = {"part": this_part(), "gather": gather_counts, "batch_size": 4}
print("RESULT" + json.dumps(evaluate(ByColor(4), Blocks(SIZES), PROTOCOL, **options)))
"""


def without_times(result):
    return {key: value for key, value in result.items() if key not in TIMES}


@pytest.fixture(scope="module")
def alone():
    return evaluate(ByColor(4), Blocks(SIZES), PROTOCOL, batch_size=4)


@pytest.mark.parametrize("processes", [1, 2, 3, 11])
def test_parts_add_up(alone, processes, monkeypatch):
    """With more processes than images, some have nothing to do."""
    sent, results = [], []

    def keep(counts):
        sent.append(counts)
        return counts[None]

    for number in range(processes):
        part = {"part": (number, processes), "gather": keep}
        evaluate(ByColor(4), Blocks(SIZES), PROTOCOL, batch_size=4, **part)
    for number in range(processes):
        part = {"part": (number, processes), "gather": lambda counts: np.stack(sent)}
        results.append(evaluate(ByColor(4), Blocks(SIZES), PROTOCOL, batch_size=4, **part))
    for result in results:
        assert without_times(result) == without_times(alone)
    assert alone["images"] == len(SIZES) and None not in alone["image_miou"]


def test_counts_beyond_32_bits():
    counts = Counts(2, 1)
    counts.confusion.counts[:] = [[2**40, 3], [5, 2**33]]
    joined = counts.joined(lambda packed: np.stack([packed, packed]))
    np.testing.assert_array_equal(joined.confusion.counts, 2 * counts.confusion.counts)


@pytest.mark.slow
def test_two_processes(alone):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, "2", str(number)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    answers = [job.communicate(timeout=300) for job in jobs]
    for job, (out, error) in zip(jobs, answers, strict=True):
        assert job.returncode == 0, error
        (line,) = (line for line in out.splitlines() if line.startswith("RESULT"))
        result = json.loads(line.removeprefix("RESULT"))
        assert without_times(result) == json.loads(json.dumps(without_times(alone)))
