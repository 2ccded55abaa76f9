"""Real runs of ``ovseg_jax.main`` in processes of their own, to be stopped and killed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from ovseg_jax.train.resume import read_run

ROOT = Path(__file__).parents[1]
CONFIG = "tests/tiny.py:restarts"
STEPS = 40  # of CONFIG: 20 in each phase
SAVED_EVERY = 5


def environment():
    """One device, little optimization by LLVM, and programs that other tests compiled."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-tests"),
    }


def begin(workdir, *arguments, through=()):
    """Starts training, perhaps `through` another command; its stderr goes to WORKDIR.log."""
    command = [*through, sys.executable, "-m", "ovseg_jax.main", f"--config={CONFIG}"]
    command += [f"--workdir={workdir}", *arguments]
    quiet = {"cwd": ROOT, "env": environment(), "stdout": subprocess.DEVNULL}
    with Path(f"{workdir}.log").open("w") as log:
        return subprocess.Popen(command, stderr=log, text=True, **quiet)


def log_of(workdir):
    """What a run said so far (the last one that was started there)."""
    return Path(f"{workdir}.log").read_text()


def finish(process, workdir, code=0, seconds=300):
    """Waits for the end, checks the exit code; returns what the run said."""
    try:
        found = process.wait(timeout=seconds)
    finally:
        process.kill()
    assert found == code, f"exit code {found}\n{log_of(workdir)}"
    return log_of(workdir)


def train(workdir, *arguments, code=0, through=()):
    """A whole run."""
    return finish(begin(workdir, *arguments, through=through), workdir, code)


def wait_until(condition, process, workdir, seconds=300):
    """Looks every millisecond; fails where the process ends before or the time is over."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended early\n{log_of(workdir)}"
        assert time.monotonic() < deadline, f"waited {seconds} s\n{log_of(workdir)}"
        time.sleep(0.001)


def workers_of(process):
    """Process ids of the data workers of a run."""
    children = Path(f"/proc/{process.pid}/task").glob("*/children")
    pids = [int(pid) for path in children for pid in path.read_text().split()]
    return [pid for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def alive(pid):
    """Whether a process is there; not where nobody has asked for its exit code yet."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def metrics_of(workdir):
    """The lines of metrics.jsonl; a last one that is being written is left out."""
    path = Path(workdir) / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def last_step(workdir):
    """The last step that was logged."""
    return max((line["step"] for line in metrics_of(workdir)), default=0)


def checkpoints_of(workdir):
    """Steps of the checkpoints that are committed."""
    folder = Path(workdir) / "checkpoints" / "latest"
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def assert_same_end(one, other):
    """Equal to the bit: every array of the last state, the model, and the losses of all steps."""
    states = [read_run(Path(workdir), "latest").state for workdir in (one, other)]
    first, second = (jax.tree_util.tree_leaves_with_path(state) for state in states)
    assert len(first) == len(second) > 100
    for (path, here), (_, there) in zip(first, second, strict=True):
        assert np.asarray(here).tobytes() == np.asarray(there).tobytes(), path
    models = [(Path(run) / "model" / "model.safetensors").read_bytes() for run in (one, other)]
    assert models[0] == models[1]
    losses = [
        [(line["step"], line["train/loss"]) for line in metrics_of(run)] for run in (one, other)
    ]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(1, STEPS + 1))
