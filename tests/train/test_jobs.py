"""What becomes of a job of two processes when something happens to one of them."""

import os
import signal
import socket

import pytest
import runs

from ovseg_jax.errors import RESTART

LONG = "--config.phases[0].steps=4000"


def begin_both(workdir, *arguments):
    """Both processes; the log of process i is WORKDIR.i.log."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = ("--processes=2", f"--coordinator=localhost:{port}", f"--workdir={workdir}")
    logs = [f"{workdir}.{number}" for number in range(2)]
    processes = [
        runs.begin(log, *common, f"--process_id={number}", *arguments)
        for number, log in enumerate(logs)
    ]
    return processes, logs


@pytest.mark.slow
def test_a_notice_to_one_stops_both_at_one_step_and_one_process_goes_on(alone, tmp_path):
    """Each process holds a half of the state; the one that goes on has the whole on one device."""
    workdir = tmp_path / "run"
    processes, logs = begin_both(workdir, "--config.mesh.fsdp=2")
    runs.wait_until(lambda: runs.last_step(workdir) >= 3, processes[0], logs[0])
    processes[1].send_signal(signal.SIGTERM)
    said = runs.finish(processes[0], logs[0], code=RESTART)
    runs.finish(processes[1], logs[1], code=RESTART)
    step = runs.checkpoints_of(workdir)[-1]
    assert f"stopped at step {step} of {runs.STEPS}" in said
    assert runs.last_step(workdir) == step < runs.STEPS
    # Another mesh and number of processes takes the same next steps, but for rounding.
    said = runs.train(workdir)
    assert f"resuming at step {step}" in said and "config.mesh.fsdp: 2 -> 1" in said
    lines = {line["step"]: line["train/loss"] for line in runs.metrics_of(workdir)}
    assert list(lines) == list(range(1, runs.STEPS + 1))
    for line in runs.metrics_of(alone.workdir)[: step + 2]:
        assert line["train/loss"] == pytest.approx(lines[line["step"]], rel=1e-4), line["step"]


@pytest.mark.slow
def test_the_death_of_one_ends_the_other_to_be_restarted(tmp_path):
    workdir = tmp_path / "run"
    processes, logs = begin_both(workdir, LONG)
    runs.wait_until(lambda: runs.checkpoints_of(workdir), processes[0], logs[0])
    processes[1].kill()
    code = processes[0].wait(timeout=400)
    processes[1].wait()
    # By Python where an error comes back, by the runtime (SIGABRT) where its own watch is faster.
    assert code in (RESTART, -signal.SIGABRT), runs.log_of(logs[0])
    said = runs.log_of(logs[0])
    assert "has lost the others" in said or "another task died" in said
    assert runs.checkpoints_of(workdir)[-1] >= 5


@pytest.mark.slow
def test_a_hang_of_one_prints_the_stacks_of_both(tmp_path):
    """The second one's data worker stalls: it waits for a batch, the first one for the second."""
    workdir = tmp_path / "run"
    arguments = ("--config.data.workers=1", "--config.hang_seconds=20", LONG)
    processes, logs = begin_both(workdir, *arguments)
    runs.wait_until(lambda: runs.last_step(workdir) >= 3, processes[0], logs[0])
    workers = runs.workers_of(processes[1])
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
        for pid in filter(runs.alive, workers):
            os.kill(pid, signal.SIGKILL)
    # The first one that leaves may take the other with it: by then both have told.
    assert set(codes) <= {RESTART, -signal.SIGABRT}
    for number, waited in enumerate(("step", "the batch of step")):
        said = runs.log_of(logs[number])
        who = f"error: process {number} of 2 has waited more than 20 s for {waited} "
        assert who in said and "train/loop.py" in said[said.index(who) :], said
