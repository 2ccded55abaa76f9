"""Several real processes on this machine: the same losses as one, and flags that do not fit."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ovseg_jax import flags, processes
from ovseg_jax.errors import UserError

ROOT = Path(__file__).parents[1]
DEVICES = 4
SHORT = ("--config.eval.benchmarks=[]", "--config.phases[0].steps=2", "--config.phases[1].steps=2")


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def train(workdir, count, *arguments):
    """Trains the tiny config in `count` processes with four devices in all."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_NUM_CPU_DEVICES": str(DEVICES // count),
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-tests"),
    }
    command = [sys.executable, "-m", "ovseg_jax.main", "--config=tests/tiny.py", *SHORT, *arguments]
    command += [f"--workdir={workdir}", f"--processes={count}"]
    port = free_port()
    running = [
        subprocess.Popen(
            [*command, f"--process_id={index}", f"--coordinator=localhost:{port}"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(count)
    ]
    output = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0] * count, "\n\n".join(output)
    return output


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone")
    train(workdir, 1)
    return workdir


@pytest.mark.slow
def test_two_processes_give_the_metrics_of_one(alone, tmp_path):
    """In both phases, with the parameters split over the processes as well."""
    output = train(tmp_path / "run", 2, f"--config.mesh.fsdp={DEVICES}")
    one, several = metrics_of(alone), metrics_of(tmp_path / "run")
    assert [line["step"] for line in several] == [1, 2, 3, 4]
    for a, b in zip(one, several, strict=True):
        assert a.keys() == b.keys()
        for name in ("loss", "contrastive", "entity", "mask", "temperature", "group_usage"):
            if f"train/{name}" in a:
                wanted, found = a[f"train/{name}"], b[f"train/{name}"]
                np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5, err_msg=name)
    assert "train/mask" in several[-1]
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    # The first process alone reports.
    assert "trained in" in output[0] and not any("trained in" in text for text in output[1:])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--processes=2"], "needs --coordinator=HOST:PORT and --process_id=I"),
        (["--process_id=1"], "need --processes=N"),
        (["--processes=many"], "auto or a number from 1, not 'many'"),
        (["--processes=2", "--process_id=2", "--coordinator=a:1"], "between 0 and 1"),
        (["--processes=2", "--process_id=0", "--coordinator=a"], "not of the form HOST:PORT"),
    ],
)
def test_flags_that_do_not_fit(given, message):
    with pytest.raises(UserError, match=message):
        processes.join(flags.parse(given, processes.FLAGS))


def test_what_started_this_process():
    cpu = {"JAX_PLATFORMS": "cpu"}
    assert processes.launcher_of(cpu) is None
    assert processes.launcher_of({**cpu, "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}) == "Slurm"
    # An interactive allocation has tasks, but this process is none of them.
    assert processes.launcher_of({**cpu, "SLURM_NTASKS": "2"}) is None
    assert processes.launcher_of({**cpu, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None
    world = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
    assert processes.launcher_of({**cpu, **world}) == "Open MPI"
    assert processes.launcher_of({}) is None  # no TPU here


def test_one_process_joins_nothing():
    processes.join(flags.parse(["--processes=1"], processes.FLAGS))
    processes.join(flags.parse([], processes.FLAGS))
    assert processes.is_first()
    tree = {"a": np.ones(2)}
    assert processes.local(tree) is tree
