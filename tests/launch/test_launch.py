"""The scripts that start runs on other machines: their syntax, their order of commands, their ends.

No cloud is asked here: `fake_gcloud.sh` takes the place of the one command that would ask it.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import runs
import yaml

LAUNCH = runs.ROOT / "launch"
HERE = Path(__file__).parent
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), HERE / "fake_gcloud.sh"])
RUN = ("--config=configs/vitb.py", "--config.phases[0].epochs=2", "--config.seed=3")


def bash(*arguments, code=0, **environment):
    done = subprocess.run(
        ["bash", *map(str, arguments)],
        cwd=runs.ROOT,
        env={**runs.environment(), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def write_script(path, body):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    tool = Path(sysconfig.get_path("scripts")) / "shellcheck"
    done = subprocess.run([tool, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- local_processes.sh


def test_local_processes_differ_in_number_and_device_alone():
    script = LAUNCH / "local_processes.sh"
    out = bash(script, 3, "--dry-run", "--workdir=runs/a", *RUN, PORT="4711")
    lines = [shlex.split(line) for line in out.splitlines()]
    assert len(lines) == 3
    for number, words in enumerate(lines):
        assert words[0] == f"CUDA_VISIBLE_DEVICES={number}"
        assert words[2:4] == ["-m", "ovseg_jax.main"] and set(RUN) < set(words)
        assert {"--processes=3", "--coordinator=localhost:4711"} < set(words)
        assert f"--process_id={number}" in words and f">runs/a.process_{number}.log" in words
    for arguments in (["none"], [], ["2", "--config=x"]):
        bash(script, *arguments, code=2)


@pytest.mark.parametrize("codes, found", [("143 2 143", 2), ("0 143 137", 143), ("0 0 0", 0)])
def test_local_processes_end_with_the_code_of_the_one_that_failed(tmp_path, codes, found):
    python = tmp_path / "python"
    write_script(
        python,
        f"codes=({codes})\n"
        'for word in "$@"; do\n'
        'case $word in --process_id=*) exit "${codes[${word#*=}]}" ;; esac\n'
        "done",
    )
    script, workdir = LAUNCH / "local_processes.sh", f"--workdir={tmp_path}/run"
    bash(script, 3, workdir, *RUN, code=found, PYTHON=str(python))


@pytest.mark.slow
def test_local_processes_train_stop_and_end_with_the_code_of_the_run(tmp_path):
    workdir = tmp_path / "run"
    command = ["bash", LAUNCH / "local_processes.sh", "2", f"--config={runs.CONFIG}"]
    process = subprocess.Popen(
        [*command, f"--workdir={workdir}"],
        cwd=runs.ROOT,
        env={**runs.environment(), "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        text=True,
    )
    runs.wait_until(lambda: runs.last_step(workdir) >= 3, process, tmp_path / "run.process_0")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 143, out
    step = runs.checkpoints_of(workdir)[-1]
    assert f"stopped at step {step}" in out
    assert (tmp_path / "run.process_1.log").exists()


# ---- slurm.sbatch


def test_slurm_prints_its_commands():
    out = bash(LAUNCH / "slurm.sbatch", "--dry-run", "--workdir=runs/a", *RUN)
    srun, requeue = out.splitlines()
    assert shlex.split(srun)[0] == "srun" and set(RUN) < set(shlex.split(srun))
    assert "scontrol requeue" in requeue


@pytest.mark.parametrize("code, requeued", [(0, 0), (2, 0), (130, 0), (143, 1), (137, 1)])
def test_slurm_requeues_what_a_restart_helps(tmp_path, code, requeued):
    # Two tasks, of which the second has lost the first one; srun says the highest code.
    lost = 137 if code else 0
    srun = f'shift 2; "$@"; first=$?; exit $((first > {lost} ? first : {lost}))'
    write_script(tmp_path / "srun", srun)
    write_script(tmp_path / "scontrol", f'echo "$@" >>{tmp_path}/calls')
    write_script(tmp_path / ".venv" / "bin" / "python", f"exit {code}")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path)}
    said = code if code in (2, 130) else max(code, lost)
    bash(LAUNCH / "slurm.sbatch", *RUN, code=said, SLURM_JOB_ID="77", **environment)
    calls = (tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else ""
    assert calls == "requeue 77\n" * requeued
    assert not list(tmp_path.glob("*.failed"))


# ---- tpu_vm.sh


@pytest.fixture
def tpu(tmp_path):
    """Calls tpu_vm.sh with a gcloud that answers as told; returns the calls it got."""
    fake = tmp_path / "bin" / "gcloud"
    fake.parent.mkdir()
    fake.write_text((HERE / "fake_gcloud.sh").read_text())
    fake.chmod(0o755)
    calls, codes, said = tmp_path / "calls", tmp_path / "codes", tmp_path / "states"

    def call(*arguments, answers=(), states=(), code=0, **environment):
        codes.write_text("".join(f"{answer}\n" for answer in answers))
        said.write_text("".join(f"{state}\n" for state in states))
        bash(
            LAUNCH / "tpu_vm.sh",
            *arguments,
            code=code,
            PATH=f"{fake.parent}:{os.environ['PATH']}",
            CALLS=str(calls),
            CODES=str(codes),
            STATES=str(said),
            POLL="0.01",
            **environment,
        )
        return calls.read_text().splitlines() if calls.exists() else []

    return call


STAGES = {
    "create": "queued-resources create",
    "install": "environment.sh tpu",
    "mount": "gcsfuse --implicit-dirs",
    "run": "run.sh <<",
    "delete": "queued-resources delete",
}


def stages(calls):
    return [name for call in calls for name, words in STAGES.items() if words in call]


def test_tpu_dry_run_prints_all_and_calls_nothing(tpu):
    script = LAUNCH / "tpu_vm.sh"
    arguments = [script, "up", "--dry-run", *RUN]
    out = bash(*arguments, BUCKET="bucket", DATA_DISK="disk", PROJECT="project")
    assert stages(out.replace("\\ ", " ").splitlines()) == [*STAGES]
    assert out.count("--project=project") >= 8 and "attach-disk" in out
    assert tpu("up", "--dry-run", *RUN, BUCKET="bucket") == []


# By what happens: arguments of `tpu`, and the stages that must follow.
UP = {
    "preempted twice": ({"answers": (143, "gone", 0)}, [*STAGES] * 3),
    "an error that would come again": ({"answers": (2,), "code": 2}, [*STAGES][:-1]),
    "a slice that was never given": (
        {
            "answers": (0,),
            "states": ("WAITING_FOR_RESOURCES", "lost", "PROVISIONING", "FAILED", "PROVISIONING"),
        },
        ["create", "delete", *STAGES],
    ),
    "a request that is refused": ({"code": 2, "REFUSE": "true"}, ["create"]),
}


@pytest.mark.parametrize("name", UP)
def test_tpu_up_goes_on_where_that_helps(tpu, name):
    options, wanted = UP[name]
    calls = tpu("up", *RUN, BUCKET="bucket", **options)
    assert stages(calls) == wanted
    for started in (call for call in calls if STAGES["run"] in call):
        assert set(RUN) < set(shlex.split(started))
        assert "--workdir=$HOME/bucket/runs/ovseg" in started


def test_tpu_up_takes_the_slice_that_is_there(tpu):
    assert stages(tpu("create")) == ["create"]
    calls = tpu("up", *RUN, answers=(0,), BUCKET="bucket")
    assert stages(calls) == [*STAGES]  # created above, not again


def test_tpu_refuses_what_it_cannot_do(tpu):
    for command in (("up",), ("go",), ("run", "--workdir=x")):  # the first has no bucket
        assert tpu(*command, code=2) == []


# ---- gke_jobset.yaml


def jobset():
    return yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())


def test_jobset_fits_the_schemas():
    document = jobset()
    schema = json.loads((HERE / "jobset.schema.json").read_text())
    jsonschema.validate(document, schema)
    for replicated in document["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}}
        job["spec"] = replicated["template"]["spec"]
        kubernetes_validate.validate(job, "1.33", strict=True)


def test_jobset_agrees_with_itself_and_with_the_program():
    job = jobset()["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    chips = int(pod["containers"][0]["resources"]["limits"]["google.com/tpu"])
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert job["parallelism"] == job["completions"] == rows * columns // chips
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [1, 2]
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    command = pod["containers"][0]["command"]
    assert command[:3] == ["python", "-m", "ovseg_jax.main"]
    assert all(word.startswith("--") for word in command[3:])
