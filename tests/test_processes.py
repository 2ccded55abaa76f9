"""Several real processes on this machine: the same losses as one, and flags that do not fit."""

import socket
import subprocess
import sys

import numpy as np
import pytest
import runs

from ovseg_jax import flags, processes
from ovseg_jax.errors import UserError

DEVICES = 4
SHORT = ("--config.eval.benchmarks=[]", "--config.phases[0].steps=2", "--config.phases[1].steps=2")


def train(workdir, count, *arguments):
    """Trains the tiny config in `count` processes with four devices in all."""
    environment = {**runs.environment(), "JAX_NUM_CPU_DEVICES": str(DEVICES // count)}
    command = [sys.executable, "-m", "ovseg_jax.main", "--config=tests/tiny.py", *SHORT, *arguments]
    command += [f"--workdir={workdir}", f"--processes={count}"]
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    running = [
        subprocess.Popen(
            [*command, f"--process_id={index}", f"--coordinator=localhost:{port}"],
            cwd=runs.ROOT,
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


@pytest.mark.slow
def test_two_processes_give_the_metrics_of_one(tmp_path):
    """In both phases, with the parameters split over the processes as well."""
    train(tmp_path / "alone", 1)
    output = train(tmp_path / "run", 2, f"--config.mesh.fsdp={DEVICES}")
    one, several = (runs.metrics_of(tmp_path / name) for name in ("alone", "run"))
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
