"""One evaluation shared between processes: the same result, whatever their number."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from segmentation.test_evaluate import PROTOCOL, SIZES, Blocks, ByColor

from ovseg_jax.segmentation.evaluate import evaluate
from ovseg_jax.segmentation.metric import Counts

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
