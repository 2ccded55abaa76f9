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
    return [sys.executable, "-m", f"ovseg_jax.{module}", *map(str, arguments)]


def environment():
    # One device, and little optimization by LLVM: compiling is most of what these runs do.
    return {
        **os.environ,
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-tests"),
    }


def call(module, *arguments, code=0):
    done = subprocess.run(
        command(module, *arguments), cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished tiny run and what it printed."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, call("main", f"--config={TINY}", f"--workdir={workdir}")


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_training_writes_everything(trained):
    workdir, done = trained
    assert done.stderr.count("start from") == 1
    lines = metrics_of(workdir)
    trained_steps = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in trained_steps] == [1, 2, 3, 4, 5, 6]
    assert ["train/mask" in line for line in trained_steps] == [False] * 3 + [True] * 3
    measured = "contrastive entity grad_norm temperature group_usage images_per_second"
    measured += " step_seconds_p50 waiting_for_data truncated_examples"
    assert {f"train/{name}" for name in measured.split()} <= lines[1].keys()
    # The first step of a phase is compiled in, and tells no speed.
    assert "train/images_per_second" not in lines[0]
    result = json.loads((workdir / "results" / "scenes.json").read_text())
    assert 0 <= result["miou"] <= 100
    scores = [line["eval/scenes/miou"] for line in lines if "eval/scenes/miou" in line]
    assert scores == [result["miou"]]
    assert (workdir / "pictures" / "scenes.png").is_file()
    assert json.loads((workdir / "config.json").read_text())["seed"] == 0
    assert "jax" in json.loads((workdir / "versions.json").read_text())
    assert any((workdir / "tensorboard").iterdir())
    assert "all background" in done.stdout and "untrained" in done.stdout
    names = {path.name for path in (workdir / "model").iterdir()}
    assert names >= {"model.safetensors", "config.json", "README.md", "tokenizer.json"}


def test_finished_run_is_not_trained_again(trained):
    workdir, _ = trained
    before = metrics_of(workdir)
    again = call("main", f"--config={TINY}", f"--workdir={workdir}")
    assert "resuming at step 6" in again.stderr
    after = metrics_of(workdir)
    assert [x for x in after if "train/loss" in x] == [x for x in before if "train/loss" in x]


def test_model_directory_evaluates_like_the_run(trained, tmp_path):
    workdir, _ = trained
    call("main", "--mode=eval", f"--config={TINY}", f"--workdir={workdir}")
    # The run calibrates anew on the tune split; the model directory carries what was found.
    result = json.loads((workdir / "results" / "scenes.json").read_text())
    protocol = json.loads((workdir / "model" / "config.json").read_text())["protocol"]
    for key in ("scale", "threshold", "window", "order"):
        assert protocol[key] == result["protocol"][key]
    out, official = tmp_path / "eval" / "results", tmp_path / "official"
    miniatures.voc(official)
    given = (f"--model={workdir}/model", "--benchmark=scenes,voc", f"--data_dir={official}")
    done = call("main", "--mode=eval", *given, "--pictures=1", f"--workdir={out.parent}")
    assert "voc: 2 images, but the whole set has 1449" in done.stdout
    assert (out / "voc.html").is_file()
    of_folder = json.loads((out / "voc.json").read_text())
    assert (of_folder["images"], len(of_folder["iou"])) == (2, 21)
    found = json.loads((out / "scenes.json").read_text())
    assert found["miou"] == pytest.approx(result["miou"], abs=1e-3)
    assert found["iou"].keys() == result["iou"].keys()


def test_evaluation_of_a_run_changes_its_eval_alone(trained):
    run = ("main", "--mode=eval", f"--config={TINY}", f"--workdir={trained[0]}")
    refused = call(*run, "--config.model.joint_width=8", code=2)
    assert "config.model.joint_width: 16 -> 8" in refused.stderr
    assert refused.stderr.startswith("error: ") and "Traceback" not in refused.stderr


def test_export_of_the_last_step_is_the_model_of_the_run(trained, tmp_path):
    workdir, out = trained[0], tmp_path / "exported"
    done = call("export", f"--workdir={workdir}", f"--out={out}")
    assert f"model: {out} (step 6, online weights)" in done.stdout
    one, other = ((path / "model.safetensors").read_bytes() for path in (workdir / "model", out))
    assert one == other
    one, other = (json.loads((p / "config.json").read_text()) for p in (workdir / "model", out))
    for key in ("protocol", "text_length"):
        assert one[key] == other[key]
    missing = call("export", f"--workdir={workdir}", f"--out={out}", "--step=best", code=2)
    assert "it has: 4, 6; no best" in missing.stderr


def test_predict_writes_masks(trained, tmp_path):
    picture, out = tmp_path / "a picture.png", tmp_path / "out"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 61, 3), np.uint8)).save(picture)
    given = (f"--model={trained[0]}/model", f"--images={picture}", "--classes=cat,fire hydrant")
    call("predict", *given, f"--out={out}")
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
    arguments = [f"--config={TINY}", f"--workdir={tmp_path}", "--config.checkpoint_every=1000"]
    process = subprocess.Popen(
        command("main", *arguments), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and len(metrics.read_text().splitlines()) >= 2:
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.02)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130, error
    assert "the same command goes on" in error
    assert "resuming at step" in call("main", *arguments).stderr
    one, other = (
        (path / "model/model.safetensors").read_bytes() for path in (trained[0], tmp_path)
    )
    assert one == other


EVAL = ("main", "--mode=eval")
ERRORS = [
    (("main", f"--config={TINY}", "--config.model.image.widht=8"), "model.image.width"),
    (("main", "--config=configs/nothing.py"), "configs/nothing.py"),
    (("main",), "--config"),
    (("main", "--confg=x"), "--config"),
    (("main", "--config=configs/quickstart.py:tiny"), "scratch"),
    (("main", f"--config={TINY}", "--config.phases[0].step=4"), "steps"),
    (("main", f"--config={TINY}", "--config.phases[7].steps=4"), "phases"),
    (("main", f"--config={TINY}", "--config.model.text_pool=max"), "eot"),
    (("main", "--config=configs/vitb.py"), "needs what is not here"),
    (("main", "--config=configs/vitb_released.py"), "config.eval.voc.dir"),
    (("main", f"--config={TINY}", "--config.eval.benchmarks=('scenes', 'ade20k')"), "ade20k.dir"),
    (EVAL, "--model"),
    ((*EVAL, f"--config={TINY}", "--workdir=/nonexistent"), "no checkpoint"),
    ((*EVAL, "--model=/nonexistent"), "no such directory"),
    ((*EVAL, f"--config={TINY}", "--data_dir=x"), "go with --mode=eval --model=DIR"),
    ((*EVAL, "--model=x", "--sweep=-1"), "at least 0"),
    (("predict", "--model=x", "--images=a.png", "--classes="), "no classes"),
    (("predict", "--model=x", "--images=/no.png", "--classes=cat"), "/no.png"),
    (("predict", "--model=/no", "--images=README.md", "--classes=cat"), "no such directory"),
]


@pytest.mark.parametrize(("command", "expected"), ERRORS)
def test_bad_input_is_one_clear_error(command, expected, tmp_path, monkeypatch, capsys):
    module, *arguments = command
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
    call("compare", *arguments)
    kinds = sorted(path.name.partition("-")[0] for path in (tmp_path / "cache").iterdir())
    assert kinds == ["images", "texts"]
    result = tmp_path / "out" / "cached-seed3" / "results" / "scenes.json"
    miou = json.loads(result.read_text())["miou"]
    table = (tmp_path / "out" / "table.txt").read_text()
    assert f"{miou:.1f}" in table and "seed 3" in table
    # A second call finds the result and trains nothing; a run's error is the command's.
    before = result.stat().st_mtime_ns
    assert table.strip() in call("compare", *arguments).stdout
    assert result.stat().st_mtime_ns == before
    failed = call("compare", f"--config={TINY}", "--config.sead=1", f"--out={tmp_path}", code=2)
    assert failed.stderr.startswith("error: ")
