"""The command line as a user meets it: train, resume, evaluate, predict, and clear errors."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from data.benchmarks import miniatures
from PIL import Image

from ovseg_jax import flags

ROOT = Path(__file__).parents[1]
TINY = "tests/tiny.py"


def command(module, *arguments):
    return [sys.executable, "-m", f"ovseg_jax.{module}", *arguments]


def environment():
    # One device, and little optimization by LLVM: compiling is most of what these runs do.
    return {
        **os.environ,
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-tests"),
    }


def call(module, *arguments):
    return subprocess.run(
        command(module, *arguments), cwd=ROOT, env=environment(), capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished tiny run and what it printed."""
    workdir = tmp_path_factory.mktemp("run")
    done = call("main", f"--config={TINY}", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    return workdir, done


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_training_writes_everything(trained):
    workdir, done = trained
    assert done.stderr.count("start from") == 1
    lines = metrics_of(workdir)
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert all("train/mask" in line for line in lines if line["step"] > 3 and "train/loss" in line)
    assert not any("train/mask" in line for line in lines if line["step"] <= 3)
    for key in (
        "train/contrastive",
        "train/entity",
        "train/grad_norm",
        "train/temperature",
        "train/group_usage",
        "train/images_per_second",
        "train/step_seconds_p50",
        "train/waiting_for_data",
        "train/truncated_examples",
    ):
        assert key in lines[1], key
    # The first step of a phase is compiled in, and tells no speed.
    assert "train/images_per_second" not in lines[0]
    result = json.loads((workdir / "results" / "scenes.json").read_text())
    assert 0 <= result["miou"] <= 100
    assert [line["eval/scenes/miou"] for line in lines if "eval/scenes/miou" in line] == [
        result["miou"]
    ]
    assert (workdir / "pictures" / "scenes.png").is_file()
    assert json.loads((workdir / "config.json").read_text())["seed"] == 0
    assert "jax" in json.loads((workdir / "versions.json").read_text())
    assert any((workdir / "tensorboard").iterdir())
    assert "all background" in done.stdout and "untrained" in done.stdout
    assert {path.name for path in (workdir / "model").iterdir()} >= {
        "model.safetensors",
        "config.json",
        "README.md",
        "tokenizer.json",
    }


def test_finished_run_is_not_trained_again(trained):
    workdir, _ = trained
    before = metrics_of(workdir)
    again = call("main", f"--config={TINY}", f"--workdir={workdir}")
    assert again.returncode == 0, again.stderr
    assert "resuming at step 6" in again.stderr
    assert [x for x in metrics_of(workdir) if "train/loss" in x] == [
        x for x in before if "train/loss" in x
    ]


def test_model_directory_evaluates_like_the_run(trained, tmp_path):
    workdir, _ = trained
    of_run = call("main", "--mode=eval", f"--config={TINY}", f"--workdir={workdir}")
    assert of_run.returncode == 0, of_run.stderr
    # The run calibrates anew on the tune split; the model directory carries what was found.
    result = json.loads((workdir / "results" / "scenes.json").read_text())
    protocol = json.loads((workdir / "model" / "config.json").read_text())["protocol"]
    for key in ("scale", "threshold", "window", "order"):
        assert protocol[key] == result["protocol"][key]
    out = tmp_path / "eval"
    miniatures.voc(tmp_path / "official")
    of_model = call(
        "main",
        "--mode=eval",
        f"--model={workdir / 'model'}",
        "--benchmark=scenes,voc",
        f"--data_dir={tmp_path / 'official'}",
        "--pictures=1",
        f"--workdir={out}",
    )
    assert of_model.returncode == 0, of_model.stderr
    assert "voc: 2 images, but the whole set has 1449" in of_model.stdout
    assert (out / "results" / "voc.html").is_file()
    of_folder = json.loads((out / "results" / "voc.json").read_text())
    assert (of_folder["images"], len(of_folder["iou"])) == (2, 21)
    found = json.loads((out / "results" / "scenes.json").read_text())
    assert found["miou"] == pytest.approx(result["miou"], abs=1e-3)
    assert found["iou"].keys() == result["iou"].keys()


def test_evaluation_of_a_run_changes_its_eval_alone(trained):
    workdir, _ = trained
    run = ("main", "--mode=eval", f"--config={TINY}", f"--workdir={workdir}")
    refused = call(*run, "--config.model.joint_width=8")
    assert refused.returncode == 2
    assert "config.model.joint_width: 16 -> 8" in refused.stderr


def test_export_of_the_last_step_is_the_model_of_the_run(trained, tmp_path):
    workdir, _ = trained
    out = tmp_path / "exported"
    done = call("export", f"--workdir={workdir}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert f"model: {out} (step 6, online weights)" in done.stdout
    one, other = ((path / "model.safetensors").read_bytes() for path in (workdir / "model", out))
    assert one == other
    protocol, length = (
        [json.loads((path / "config.json").read_text())[key] for path in (workdir / "model", out)]
        for key in ("protocol", "text_length")
    )
    assert protocol[0] == protocol[1] and length[0] == length[1]
    missing = call("export", f"--workdir={workdir}", f"--out={out}", "--step=best")
    assert missing.returncode == 2
    assert "it has: 4, 6; no best" in missing.stderr


def test_predict_writes_masks(trained, tmp_path):
    workdir, _ = trained
    picture = tmp_path / "a picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 61, 3), np.uint8)).save(picture)
    out = tmp_path / "out"
    done = call(
        "predict",
        f"--model={workdir / 'model'}",
        f"--images={picture}",
        "--classes=cat,fire hydrant",
        f"--out={out}",
    )
    assert done.returncode == 0, done.stderr
    with Image.open(out / "a picture.mask.png") as mask:
        assert mask.mode == "P" and mask.size == (61, 40)
        assert np.asarray(mask).max() <= 2
    with Image.open(out / "a picture.overlay.png") as picture:
        assert picture.size[0] >= 61
    record = json.loads((out / "a picture.json").read_text())
    assert [entry["name"] for entry in record["classes"]] == ["cat", "fire hydrant"]
    areas = sum(entry["area"] for entry in record["classes"]) + record["background"]
    assert areas == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_resumes_to_the_bit(trained, tmp_path):
    workdir, _ = trained
    arguments = [f"--config={TINY}", f"--workdir={tmp_path}", "--config.checkpoint_every=1000"]
    process = subprocess.Popen(
        command("main", *arguments),
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and len(metrics.read_text().splitlines()) >= 2:
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.02)
    out, error = process.communicate(timeout=300)
    assert process.returncode == 130, error
    assert "the same command goes on" in error
    resumed = call("main", *arguments)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at step" in resumed.stderr
    one, other = (
        (path / "model" / "model.safetensors").read_bytes() for path in (workdir, tmp_path)
    )
    assert one == other


ERRORS = {
    "unknown config key": (
        ["main", f"--config={TINY}", "--config.model.image.widht=8"],
        "model.image.width",
    ),
    "missing config": (["main", "--config=configs/nothing.py"], "configs/nothing.py"),
    "no config": (["main"], "--config"),
    "unknown flag": (["main", "--confg=x"], "--config"),
    "unknown variant": (["main", "--config=configs/quickstart.py:tiny"], "scratch"),
    "bad phase field": (["main", f"--config={TINY}", "--config.phases[0].step=4"], "steps"),
    "no such phase": (["main", f"--config={TINY}", "--config.phases[7].steps=4"], "phases"),
    "bad choice": (["main", f"--config={TINY}", "--config.model.text_pool=max"], "eot"),
    "eval without anything": (["main", "--mode=eval"], "--model"),
    "eval of a missing run": (
        ["main", "--mode=eval", f"--config={TINY}", "--workdir=/nonexistent"],
        "no checkpoint",
    ),
    "eval of a missing model": (
        ["main", "--mode=eval", "--model=/nonexistent"],
        "no such directory",
    ),
    "settings of a model for a run": (
        ["main", "--mode=eval", f"--config={TINY}", "--data_dir=x"],
        "go with --mode=eval --model=DIR",
    ),
    "negative sweep": (["main", "--mode=eval", "--model=x", "--sweep=-1"], "at least 0"),
    "vitb without data": (["main", "--config=configs/vitb.py"], "needs what is not here"),
    "a best state without images to choose on": (
        ["main", "--config=configs/vitb_released.py"],
        "config.eval.voc.dir",
    ),
    "a benchmark without files": (
        ["main", f"--config={TINY}", "--config.eval.benchmarks=('scenes', 'ade20k')"],
        "config.eval.ade20k.dir",
    ),
    "no classes": (["predict", "--model=x", "--images=a.png", "--classes="], "no classes"),
    "missing image": (["predict", "--model=x", "--images=/no.png", "--classes=cat"], "/no.png"),
    "missing model": (
        ["predict", "--model=/nonexistent", "--images=README.md", "--classes=cat"],
        "no such directory",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_one_clear_error(name, tmp_path, monkeypatch, capsys):
    (module, *arguments), expected = ERRORS[name]
    if module == "main" and not any("workdir" in argument for argument in arguments):
        arguments.append(f"--workdir={tmp_path}")
    # In this process: starting Python for each would take longer than everything they do.
    entry = importlib.import_module(f"ovseg_jax.{module}")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.setattr(entry, "enable_compilation_cache", lambda: None)
    with pytest.raises(SystemExit) as stop:
        flags.run(entry.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and expected in error


def test_an_error_is_no_traceback_for_a_process():
    done = call("main", f"--config={TINY}", "--config.model.image.widht=8")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "model.image.width" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_lists_the_flags():
    done = call("main", "--help")
    assert done.returncode == 0
    assert "--workdir" in done.stdout and "--benchmark" in done.stdout


@pytest.mark.slow
def test_compare_trains_on_cached_features_and_prints_a_table(tmp_path):
    arguments = [
        f"--config={TINY}",
        "--variants=cached",
        "--seeds=3",
        f"--out={tmp_path / 'out'}",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
        "--config.eval.untrained=false",
    ]
    done = call("compare", *arguments)
    assert done.returncode == 0, done.stderr
    kinds = sorted(path.name.partition("-")[0] for path in (tmp_path / "cache").iterdir())
    assert kinds == ["images", "texts"]
    result = tmp_path / "out" / "cached-seed3" / "results" / "scenes.json"
    miou = json.loads(result.read_text())["miou"]
    table = (tmp_path / "out" / "table.txt").read_text()
    assert f"{miou:.1f}" in table and "seed 3" in table
    # A second call finds the result and trains nothing.
    before = result.stat().st_mtime_ns
    again = call("compare", *arguments)
    assert again.returncode == 0 and table.strip() in again.stdout
    assert result.stat().st_mtime_ns == before
