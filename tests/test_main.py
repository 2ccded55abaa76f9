"""The command line as a user meets it: train, resume, evaluate, predict, and clear errors."""

import importlib
import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import runs
from data.benchmarks import miniatures
from PIL import Image

from ovseg_jax import compare, flags

TINY = "tests/tiny.py"


def command(module, *arguments):
    return [sys.executable, "-m", f"ovseg_jax.{module}", *map(str, arguments)]


def call(module, *arguments, code=0):
    done = subprocess.run(
        command(module, *arguments),
        cwd=runs.ROOT,
        env=runs.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A tiny run that got Ctrl-C after its first step, and what it said."""
    workdir = tmp_path_factory.mktemp("run")
    arguments = command("main", f"--config={TINY}", f"--workdir={workdir}")
    process = subprocess.Popen(
        arguments, cwd=runs.ROOT, env=runs.environment(), stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline and not runs.last_step(workdir):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130, error
    return workdir, error


@pytest.fixture(scope="module")
def trained(stopped):
    """The same command given again to its end, and what it printed."""
    workdir, _ = stopped
    return workdir, call("main", f"--config={TINY}", f"--workdir={workdir}")


def refused(monkeypatch, capsys, module, *arguments):
    """The one clear error of a command, in this process: starting Python would take longer."""
    entry = importlib.import_module(f"ovseg_jax.{module}")
    monkeypatch.chdir(runs.ROOT)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.setattr(entry, "enable_compilation_cache", lambda: None, raising=False)
    with pytest.raises(SystemExit) as stop:
        flags.run(entry.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ")
    return error


def test_training_writes_everything(trained):
    workdir, done = trained
    assert done.stderr.count("start from") == 1
    lines = runs.metrics_of(workdir)
    trained_steps = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in trained_steps] == [1, 2, 3, 4, 5, 6]
    assert ["train/mask" in line for line in trained_steps] == [False] * 3 + [True] * 3
    measured = "contrastive entity grad_norm temperature group_usage images_per_second"
    measured += " step_seconds_p50 waiting_for_data truncated_examples"
    assert {f"train/{name}" for name in measured.split()} <= lines[-2].keys()
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


def test_ctrl_c_saves_and_the_same_command_goes_on(stopped, trained):
    """To the bit, as after SIGTERM: see `train.test_failures`."""
    assert "the same command goes on" in stopped[1]
    assert "resuming at step" in trained[1].stderr


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


def test_evaluation_of_a_run_changes_its_eval_alone(trained, monkeypatch, capsys):
    run = ("main", "--mode=eval", f"--config={TINY}", f"--workdir={trained[0]}")
    said = refused(monkeypatch, capsys, *run, "--config.model.joint_width=8")
    assert "config.model.joint_width: 16 -> 8" in said


def test_export_of_the_last_step_is_the_model_of_the_run(trained, tmp_path, monkeypatch, capsys):
    workdir, out = trained[0], tmp_path / "exported"
    done = call("export", f"--workdir={workdir}", f"--out={out}")
    assert f"model: {out} (step 6, online weights)" in done.stdout
    one, other = ((path / "model.safetensors").read_bytes() for path in (workdir / "model", out))
    assert one == other
    one, other = (json.loads((p / "config.json").read_text()) for p in (workdir / "model", out))
    for key in ("protocol", "text_length"):
        assert one[key] == other[key]
    wrong = ("export", f"--workdir={workdir}", f"--out={out}", "--step=best")
    assert re.search(r"it has: \d, 6; no best", refused(monkeypatch, capsys, *wrong))


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
    assert expected in refused(monkeypatch, capsys, module, *arguments)


@pytest.mark.slow
def test_compare_trains_on_cached_features_and_prints_a_table(tmp_path, monkeypatch, capsys):
    arguments = [
        f"--config={TINY}",
        "--variants=cached",
        "--seeds=3",
        f"--out={tmp_path / 'out'}",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
        *(f"--config.eval.{field}=false" for field in ("untrained", "calibrate")),
        "--config.eval.pictures=0",
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
    monkeypatch.chdir(runs.ROOT)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert compare.main(arguments) == 0
    assert table.strip() in capsys.readouterr().out
    assert result.stat().st_mtime_ns == before
    assert compare.main([f"--config={TINY}", "--config.sead=1", f"--out={tmp_path}"]) == 2
