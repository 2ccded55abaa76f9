"""What goes wrong on real machines, done to real processes.

SIGKILL, also in the middle of a save, is `test_kills`.
"""

import os
import re
import shutil
import signal
import subprocess

import pytest
import runs

from ovseg_jax.errors import RESTART
from ovseg_jax.train import intact

LONG = ("--config.phases[0].steps=4000",)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that got SIGUSR1 after step 3 and SIGTERM after step 12, and what it said."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    process = runs.begin(workdir)
    runs.wait_until(lambda: runs.last_step(workdir) >= 3, process, workdir)
    process.send_signal(signal.SIGUSR1)
    runs.wait_until(lambda: runs.last_step(workdir) >= 12, process, workdir)
    process.send_signal(signal.SIGTERM)
    return workdir, runs.finish(process, workdir, code=RESTART)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on_to_the_bit(stopped, alone, tmp_path):
    workdir, said = stopped
    step = runs.checkpoints_of(workdir)[-1]
    assert 12 <= step <= 20
    assert f"stopped at step {step} of {runs.STEPS}; the same command goes on" in said
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    assert f"resuming at step {step}" in runs.train(copy)
    runs.assert_same_end(copy, alone.workdir)


def test_sigusr1_prints_the_stacks_and_the_run_goes_on(stopped):
    _, said = stopped
    assert "Current thread" in said and "train/loop.py" in said


@pytest.mark.slow
def test_a_truncated_checkpoint_falls_back_to_the_one_before(stopped, alone, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(stopped[0], copy)
    before, last = runs.checkpoints_of(copy)
    folder = copy / "checkpoints" / "latest" / str(last)
    largest = max(folder.rglob("*"), key=lambda path: path.stat().st_size)
    size = largest.stat().st_size
    with largest.open("r+b") as file:
        file.truncate(size // 2)
    said = runs.train(copy)
    name = largest.relative_to(folder)
    assert f"the checkpoint of step {last} is damaged" in said
    assert f"{name} has {size // 2} bytes of {size}" in said
    assert f"resuming at step {before}" in said
    assert (copy / "checkpoints" / "damaged" / str(last)).is_dir()
    runs.assert_same_end(copy, alone.workdir)


@pytest.mark.slow
def test_a_file_too_large_ends_the_run_with_one_error(tmp_path):
    workdir = tmp_path / "run"
    limited = ("bash", "-c", 'ulimit -f 300; exec "$@"', "bash")  # KiB
    said = runs.train(workdir, code=2, through=limited)
    error = said[said.index("error: ") :]
    assert "a checkpoint could not be written" in error and "File too large" in error
    assert "None was saved before" in error
    assert runs.checkpoints_of(workdir) == []


def mounted(folder, megabytes):
    """Whether a file system of its own could be mounted on a folder."""
    options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    try:
        return subprocess.run(["mount", *options], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.slow
def test_a_full_disk_keeps_what_is_complete(tmp_path):
    """On a tmpfs that holds one or two checkpoints. Where mounting is not allowed, the file-size
    limit of the test before is all that can be had; it says so."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    if not mounted(workdir, 9):
        print("mounting is not allowed here: tested with a checkpoint larger than any disk")
        why = intact.refused_space(workdir, 10**18)
        assert str(workdir) in why and why.endswith("the checkpoint takes 1000000000000.0 MB")
        return
    try:
        said = runs.train(workdir, code=2)
        refused = int(re.search(r"error: no room for the checkpoint of step (\d+)", said)[1])
        last = refused - runs.SAVED_EVERY
        assert f"That of step {last} is complete: the same command goes on from there" in said
        assert "Traceback" not in said
        assert runs.checkpoints_of(workdir)[-1] == last
        subprocess.run(["mount", "-o", "remount,size=200m", str(workdir)], check=True)
        assert f"resuming at step {last}" in runs.train(workdir)
    finally:
        subprocess.run(["umount", "-l", str(workdir)], check=True)


def test_a_file_for_a_parent_is_one_error(tmp_path):
    (tmp_path / "file").write_text("no folder")
    workdir = tmp_path / "file" / "run"
    command = runs.begin(tmp_path / "log", f"--workdir={workdir}")
    said = runs.finish(command, tmp_path / "log", code=2)
    error = said[said.index("error: ") :]
    assert f"{workdir}" in error and "cannot be written" in error and error.count("\n") == 1


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


@pytest.mark.slow
def test_a_loss_that_stays_nan_is_refused(tmp_path):
    said = runs.train(
        tmp_path / "run",
        "--config.optimizer.learning_rate.peak=1e30",
        "--config.max_skipped=3",
        code=2,
    )
    assert "error: loss or gradients were not finite in 3 steps in a row" in said
    assert "Traceback" not in said
