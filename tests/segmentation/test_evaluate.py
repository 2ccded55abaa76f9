"""From images to results: confusion matrices, benchmarks, segmenters that are exact, processes."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import runs
from hypothesis import given, settings
from hypothesis import strategies as st

from ovseg_jax.errors import UserError
from ovseg_jax.segmentation import evaluate as evaluation
from ovseg_jax.segmentation.benchmarks import make_benchmark
from ovseg_jax.segmentation.evaluate import (
    Counts,
    count_pixels,
    evaluate,
    iou_of,
    mean_iou,
    measures,
)
from ovseg_jax.segmentation.protocol import Protocol, names_hash

PATCH, C = 4, 3
PROTOCOL = Protocol(short_side=24, long_limit=64, window=24, stride=12, scale=30.0, threshold=0.617)
SIZES = ((24, 24), (24, 40), (50, 24), (90, 130), (24, 24), (12, 200), (7, 5), (24, 40))


class ByColor:
    """A segmenter whose group of a patch is its strongest channel, and whose classes are these."""

    def __init__(self, batch_size):
        self.batch_size, self.calls = batch_size, []

    def encode(self, images):
        assert images.dtype == np.uint8 and len(images) == self.batch_size
        self.calls.append(images.shape)
        b, h, w, _ = images.shape
        h, w = h // PATCH, w // PATCH
        cells = images[:, : h * PATCH, : w * PATCH].reshape(b, h, PATCH, w, PATCH, 3)
        color = cells.mean((2, 4)).reshape(b, h * w, 3)
        # Four groups: the three channels, and dark.
        strength = np.concatenate([color, np.full((b, h * w, 1), 60.0)], -1)
        affinity = np.eye(4, dtype=np.float32)[strength.argmax(-1)]
        groups = np.concatenate([np.eye(3), np.zeros((1, 3))]).astype(np.float32)
        return affinity, np.tile(groups, (b, 1, 1)), color.mean(1).astype(np.float32)

    def text(self, names, templates):
        assert templates == PROTOCOL.templates
        return (np.eye(len(names), dtype=np.float32),) * 2


@dataclass
class Blocks:
    """Images of colored blocks on a dark ground; labels agree with the patches exactly."""

    sizes: tuple
    has_background: bool = True
    name = "blocks"
    class_names = ("red", "green", "blue")
    unseen = (2,)

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        rng = np.random.default_rng([7, index])
        h, w = self.sizes[index]
        first = 0 if self.has_background else 1
        labels = rng.integers(first, C + 1, (-(-h // 12), -(-w // 12)))
        labels = labels.repeat(12, 0).repeat(12, 1)[:h, :w]
        table = np.array([(20, 20, 20), (220, 30, 30), (30, 220, 30), (30, 30, 220)], np.uint8)
        return table[labels], (labels - first).astype(np.uint8)

    def describe(self):
        return {"images": len(self)}


def run(benchmark, protocol=PROTOCOL, batch_size=4, **options):
    segmenter = ByColor(batch_size)
    return evaluate(segmenter, benchmark, protocol, batch_size=batch_size, **options), segmenter


# ---- confusion matrices


@settings(max_examples=40)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=4), st.sampled_from([2, 21, 60, 150]))
def test_published_formula(seeds, classes):
    """mmsegmentation's: histograms of intersection, prediction and truth of each image, summed.
    With ignored pixels, classes that are absent, and classes that are never predicted."""
    confusion, totals = 0, np.zeros((3, classes))
    for seed in seeds:
        rng = np.random.default_rng(seed)
        pair = (rng.integers(0, rng.integers(1, classes + 1), (3, 7, 5)) for _ in range(2))
        prediction, truth = (x.astype(np.uint8) for x in pair)
        truth[rng.random(truth.shape) < 0.2] = 255
        confusion += count_pixels(prediction, truth, classes)
        p, t = prediction[truth != 255], truth[truth != 255]
        for row, values in enumerate((p[p == t], p, t)):
            totals[row] += np.histogram(values, bins=classes, range=(0, classes - 1))[0]
    intersect, area_p, area_t = totals
    with np.errstate(invalid="ignore"):
        iou, accuracy = intersect / (area_p + area_t - intersect), intersect / area_t
    np.testing.assert_allclose(iou_of(confusion), iou, rtol=0, atol=1e-12)
    expected = {
        "miou": np.nanmean(iou),
        "mean_accuracy": np.nanmean(accuracy),
        "pixel_accuracy": intersect.sum() / area_t.sum(),
        "frequency_weighted_iou": np.nansum(iou * area_t) / area_t.sum(),
    }
    assert measures(confusion) == pytest.approx(expected, abs=1e-12)


def test_a_worked_example():
    # Class 3 is neither drawn nor predicted: left out. Class 2 is predicted only: counts as zero.
    prediction = np.array([[0, 1, 1], [2, 0, 1]], np.int64)
    truth = np.array([[0, 1, 0], [0, 255, 1]], np.uint8)
    confusion = count_pixels(prediction, truth, 4)
    np.testing.assert_allclose(iou_of(confusion), [1 / 3, 2 / 3, 0, np.nan])
    assert mean_iou(confusion) == pytest.approx(1 / 3)
    assert mean_iou(confusion, [0, 1]) == pytest.approx(0.5)
    assert np.isnan(mean_iou(confusion, [3])) and np.isnan(mean_iou(confusion, []))
    assert confusion.dtype == np.int64
    assert np.isnan(list(measures(np.zeros((2, 2), np.int64)).values())).all()

    zeros, strange = np.zeros((2, 2), np.uint8), np.array([[0, 3], [0, 0]], np.uint8)
    for prediction, truth, said in (
        (zeros, np.zeros((2, 3), np.uint8), "shape"),
        (zeros, strange, "truth has labels 0..3"),
        (-strange.astype(int), zeros, "prediction has labels -3..0"),
    ):
        with pytest.raises(UserError, match=said):
            count_pixels(prediction, truth, 3)
    # A strange prediction where the truth is ignored does not matter.
    assert not count_pixels(strange, zeros + np.uint8(255), 3).any()


# ---- evaluation


@pytest.mark.parametrize("background", [True, False])
def test_a_perfect_segmenter_scores_100(background):
    # Votes by patch, since blocks are whole patches; seven images leave a padded last batch.
    benchmark = Blocks(((24, 24),) * 7, background)
    result, segmenter = run(benchmark, PROTOCOL.replace(order="argmax_first"))
    assert segmenter.calls == [(4, 24, 24, 3)] * 2
    assert result["miou"] == result["pixel_accuracy"] == result["miou_unseen"] == 100.0
    names = (*["background"] * background, "red", "green", "blue")
    assert result["iou"] == dict.fromkeys(names, 100.0)
    assert result["images"] == 7 and result["images_per_second"] > 0
    assert (result["protocol"]["threshold"] is None) == (not background)
    truth = np.stack([benchmark[i][1] for i in range(7)])
    if background:
        expected = 100 * (truth == 0).mean() / len(np.unique(truth))
        assert result["all_background_miou"] == pytest.approx(expected, abs=1e-3)
        with pytest.raises(UserError, match="threshold"):
            run(benchmark, PROTOCOL.replace(threshold=None))


def test_progress_and_file(tmp_path):
    steps, benchmark = [], Blocks(((24, 24),) * 6)
    protocol = PROTOCOL.replace(thresholds={"blocks": 0.3, "other": 0.7})
    result, _ = run(benchmark, protocol, progress=lambda *counts: steps.append(counts))
    assert steps == [(4, 6), (6, 6)]
    path = tmp_path / "results" / "blocks.json"
    evaluation.write_result(path, result)
    assert json.loads(path.read_text()) == result
    assert [p.name for p in path.parent.iterdir()] == ["blocks.json"]
    stored = result["protocol"]
    assert stored["class_names_hash"] == names_hash(("red", "green", "blue"))
    assert stored["scale"] == 30.0 and stored["classes"] == 3 and stored["background"]
    assert stored["threshold"] == 0.3 and stored["thresholds"] == {}
    nothing = evaluation.summary(np.zeros((4, 4), np.int64), benchmark)
    assert nothing["miou"] is None and nothing["iou"]["red"] is None


def test_scenes():
    benchmark = make_benchmark("scenes", {"split": "tune", "count": 2, "seed": 3, "size": 42})
    image, labels = benchmark[1]
    assert image.shape == (42, 42, 3) and labels.shape == (42, 42)
    assert 0 < labels.max() <= len(benchmark.class_names) > len(benchmark.unseen) > 0
    assert len(list(benchmark)) == 2 and benchmark.describe()["seed"] == 3
    for name, fields, said in (
        ("scene", {}, "there are scenes.*did you mean 'scenes'.$"),
        ("scenes", {"sise": 3}, "sise"),
        ("scenes", {"split": "val"}, "split 'val'"),
        ("scenes", {"count": 0}, "count"),
    ):
        with pytest.raises(UserError, match=said):
            make_benchmark(name, fields)


# ---- several processes

# A process of a job: it evaluates its part, and prints the whole result.
PROCESS = """
import json, sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
from ovseg_jax.segmentation.evaluate import evaluate, gather_counts
from segmentation.test_evaluate import PROTOCOL, SIZES, Blocks, ByColor
part = jax.process_index(), jax.process_count()
options = {"part": part, "gather": gather_counts, "batch_size": 4}
print("RESULT" + json.dumps(evaluate(ByColor(4), Blocks(SIZES), PROTOCOL, **options)))
"""


def without_times(result):
    skipped = ("seconds", "images_per_second")
    return {key: value for key, value in result.items() if key not in skipped}


@pytest.fixture(scope="module")
def alone():
    return evaluate(ByColor(4), Blocks(SIZES), PROTOCOL, batch_size=4)


@pytest.mark.parametrize("processes", [1, 3, 11])
def test_parts_add_up(alone, processes):
    """With more processes than images, some have nothing to do."""
    sent, results = [], []

    def keep(counts):
        sent.append(counts)
        return counts[None]

    for gather in (keep, lambda counts: np.stack(sent)):
        for number in range(processes):
            part = {"part": (number, processes), "gather": gather}
            results.append(run(Blocks(SIZES), batch_size=3, **part)[0])
    for result in results[processes:]:
        assert without_times(result) == without_times(alone)
    assert alone["images"] == len(SIZES) and None not in alone["image_miou"]
    assert 40 < alone["miou"] < 100 and alone["group_usage"]["groups"] == 4


def test_counts_beyond_32_bits():
    counts = Counts(2, 1)
    counts.confusion[:] = [[2**40, 3], [5, 2**33]]
    counts.join(lambda packed: np.stack([packed, packed]), 1.0, 1.0)
    np.testing.assert_array_equal(counts.confusion, [[2**41, 6], [10, 2**34]])


@pytest.mark.slow
def test_two_processes(alone):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    path = os.pathsep.join([str(runs.ROOT), str(runs.ROOT / "tests")])
    environment = {**runs.environment(), "PYTHONPATH": path}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    commands = ([sys.executable, "-c", PROCESS, address, "2", str(i)] for i in range(2))
    jobs = [subprocess.Popen(command, env=environment, **options) for command in commands]
    answers = [job.communicate(timeout=300) for job in jobs]
    for job, (out, error) in zip(jobs, answers, strict=True):
        assert job.returncode == 0, error
        (line,) = (line for line in out.splitlines() if line.startswith("RESULT"))
        result = json.loads(line.removeprefix("RESULT"))
        assert without_times(result) == json.loads(json.dumps(without_times(alone)))
