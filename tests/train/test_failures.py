"""What goes wrong on real machines, done to real processes, alone and in a job of two."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import kills
import pytest
import runs

from ovseg_jax.errors import RESTART

LONG = ("--config.phases[0].steps=4000",)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that got SIGUSR1 after step 3 and SIGTERM after step 6, and what it said."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    process = runs.begin(workdir)
    runs.wait_until(lambda: runs.last_step(workdir) >= 3, process, workdir)
    process.send_signal(signal.SIGUSR1)
    runs.wait_until(lambda: runs.last_step(workdir) >= 6, process, workdir)
    process.send_signal(signal.SIGTERM)
    return workdir, runs.finish(process, workdir, code=RESTART)


@pytest.mark.slow
def test_a_run_that_is_stopped_and_killed_three_times_ends_like_the_run_left_alone(
    stopped, alone, tmp_path
):
    """To the bit. SIGKILL at random moments, of both phases, costs nothing but time."""
    workdir, said = stopped
    step = runs.checkpoints_of(workdir)[-1]
    assert 6 <= step <= 15
    assert f"stopped at step {step} of {runs.STEPS}; the same command goes on" in said
    killed, told = tmp_path / "killed", []
    shutil.copytree(workdir, killed)
    kills.run_with_kills(alone.workdir, killed, count=3, seed=1, say=told.append)
    assert len(told) == 4 and "equal to the bit" in told[-1]
    steps = [int(re.search(r"killed after step (\d+)", line)[1]) for line in told[:3]]
    assert min(steps) < runs.STEPS / 2 <= max(steps)


def test_sigusr1_prints_the_stacks_and_the_run_goes_on(stopped):
    _, said = stopped
    assert "Current thread" in said and "train/loop.py" in said


@pytest.mark.slow
def test_a_file_too_large_ends_the_run_with_one_error(tmp_path):
    workdir = tmp_path / "run"
    limited = ("bash", "-c", 'ulimit -f 300; exec "$@"', "bash")  # KiB
    said = runs.train(workdir, code=2, through=limited)
    error = said[said.index("error: ") :]
    assert "a checkpoint could not be written" in error and "File too large" in error
    assert "None was saved before" in error
    assert runs.checkpoints_of(workdir) == []


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_run_to_be_restarted(tmp_path):
    workdir = tmp_path / "run"
    process = runs.begin(workdir, "--config.data.workers=2", *LONG)
    runs.wait_until(lambda: runs.last_step(workdir) >= 3, process, workdir)
    os.kill(runs.workers_of(process)[0], signal.SIGKILL)
    said = runs.finish(process, workdir, code=RESTART)
    assert "error: a worker process that reads data was killed" in said


@pytest.mark.slow
def test_a_loader_that_stalls_is_told_apart_and_ended(tmp_path):
    workdir = tmp_path / "run"
    process = runs.begin(workdir, "--config.data.workers=1", "--config.hang_seconds=15", *LONG)
    runs.wait_until(lambda: runs.last_step(workdir) >= 3, process, workdir)
    workers = runs.workers_of(process)
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    said = runs.finish(process, workdir, code=RESTART)
    error = said[said.index("error: ") :]
    assert "has waited more than 15 s for the batch of step" in error
    assert "config.hang_seconds" in error and "train/loop.py" in error
    assert not any(runs.alive(pid) for pid in workers)


# ---- jobs of two processes


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
    processes, logs = begin_both(workdir, *LONG)
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
    arguments = ("--config.data.workers=1", "--config.hang_seconds=20", *LONG)
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


# ---- stacks on request

# A second lock of a plain mutex waits for ever, whatever signal comes; Python's own lock is free.
WAITING = """
import ctypes, threading
from ovseg_jax.train.signals import print_stacks_on_signal

def work():
    while True:
        exec("def deeper(n):\\n    return n and deeper(n - 1)\\ndeeper(60)", {})

def come_and_go():
    while True:
        thread = threading.Thread(target=lambda: [str(n) for n in range(50)])
        thread.start()
        thread.join()

def stuck():
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
    library.pthread_mutex_lock(mutex)
    print("ready", flush=True)
    library.pthread_mutex_lock(mutex)

print_stacks_on_signal()
for target in (work, work, come_and_go):
    threading.Thread(target=target, daemon=True).start()
stuck()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="zeros are a mutex on Linux")
def test_stacks_of_a_main_thread_that_waits_beside_others_that_work(tmp_path):
    """Beside such threads a process with `faulthandler.register` crashes after some hundred signals
    (in two of five tries, by Python 3.11)."""
    workdir, command = tmp_path / "run", [sys.executable, "-c", WAITING]
    with Path(f"{workdir}.log").open("w") as file:
        process = subprocess.Popen(command, cwd=runs.ROOT, stdout=file, stderr=subprocess.STDOUT)

    def wait_for(words, count):
        runs.wait_until(lambda: runs.log_of(workdir).count(words) >= count, process, workdir, 60)

    try:
        wait_for("ready", 1)
        for count in range(1, 4):
            process.send_signal(signal.SIGUSR1)
            wait_for("in stuck", count)
        for _ in range(500):
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.001)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
