"""Whole runs: evaluations in their course, a changed config, what they say; the work directory."""

import contextlib
import os
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import runs

from ovseg_jax import sharding
from ovseg_jax.errors import RestartError, UserError
from ovseg_jax.progress import Progress
from ovseg_jax.train import loop
from ovseg_jax.train.config import changed_fields, load_config, plain
from ovseg_jax.train.loop import _Training, locked, train
from ovseg_jax.train.phases import make_phases

EVERY = 2
# By step. Phase 1 has four steps.
SCORES = {2: 50.0, 4: 10.0, 6: 20.0}


def on_one_device(monkeypatch):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda **_: mesh)


@pytest.fixture
def config(monkeypatch):
    """On one device. Phase 2 starts from the best state and does not move it: its rate is 0."""
    config = load_config(runs.ROOT / "tests" / "tiny.py:restarts")
    for phase in config.phases:
        phase.update(steps=4, mask_weight=0.0)
    still = {"peak": 0.0, "end": 0.0}
    config.phases[1].update(steps=3, start_from="best", learning_rate=still)
    config.eval.update(benchmarks=("scenes",), every=EVERY, tune_count=4, batch_size=4)
    config.checkpoint_every = 1000
    config.data.text_length = 8  # too short for some captions
    on_one_device(monkeypatch)
    return config


@pytest.fixture
def scores(monkeypatch):
    """The real evaluation with the mIoU of `SCORES`; those made so far, and steps that fail."""
    real, made, failing = loop.calibrated, [], set()

    def calibrated(segmenter, tune, protocol, batch_size):
        step = EVERY * (len(made) + 1)
        if step in failing:
            failing.remove(step)
            raise UserError("no image")
        chosen, miou = real(segmenter, tune, protocol, batch_size)
        assert len(tune) == 4 and 0 <= miou <= 100
        made.append(step)
        return chosen, SCORES[step]

    monkeypatch.setattr(loop, "calibrated", calibrated)
    return made, failing


def test_a_best_state_is_kept_and_started_from_and_a_failed_evaluation_costs_no_step(
    config, scores, tmp_path
):
    made, failing = scores
    failing.add(4)
    with pytest.raises(UserError, match="no image"):
        train(config, tmp_path, Progress(quiet=True))
    assert runs.checkpoints_of(tmp_path) == [2, 4]
    progress = Progress(quiet=True)
    said, progress.say = [], lambda line: said.append(line)
    _, state = train(config, tmp_path, progress)
    assert made == [2, 4, 6]
    lines = [(x["step"], x.get("eval/scenes_tune/miou")) for x in runs.metrics_of(tmp_path)]
    assert [line for line in lines if line[1]] == list(SCORES.items())
    assert [step for step, miou in lines if miou is None] == [1, 2, 3, 4, 5, 6, 7]
    # Examples whose texts lost words are counted for each phase, and not sent to the device.
    cuts = [line.get("train/truncated_examples") for line in runs.metrics_of(tmp_path)]
    cut = [count for count in cuts if count is not None][4:]
    assert 0 < cut[0] <= cut[-1] <= 3 * 8
    assert any(f"{cut[-1]:.0f} of 24 examples in " in line for line in said)
    best = runs.read_run(tmp_path, "best")
    assert best.position["step"] == 2 and int(state.step) == 7
    for one, other in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(best.state.params), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_a_profile_is_a_trace_and_metrics_have_their_phase(alone):
    assert f"trace: {alone.workdir / 'profile'}" in alone.said
    traces = list((alone.workdir / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 1000
    lines = runs.metrics_of(alone.workdir)
    half = runs.STEPS // 2
    assert [line["train/phase"] for line in lines] == [0.0] * half + [1.0] * half
    for line in lines:
        for name in ("contrastive", "entity", "temperature", "group_usage", "learning_rate"):
            assert f"train/{name}" in line
        # The first step of a phase is compiled in, and tells no speed.
        assert ("train/images_per_second" in line) == (line["step"] not in (1, half + 1))
        if "train/images_per_second" in line:
            quick, usual, slow = (line[f"train/step_seconds_p{name}"] for name in (50, 90, 99))
            assert 0 < quick <= usual <= slow
            assert 0 <= line["train/waiting_for_data"] <= 1


LONGER = {"phases": ({"steps": 50, "batch_size": 8}, {"steps": 20, "batch_size": 8})}
CHANGES = {
    "a field without consequences for shapes": (
        {"optimizer.learning_rate.peak": 0.001},
        ["config.optimizer.learning_rate.peak: 0.0015 -> 0.001", "resuming at step 40"],
    ),
    "another width": (
        {"model.joint_width": 8},
        ["does not fit this config", "config.model.joint_width: 16 -> 8"],
    ),
    "a step in another phase": (
        LONGER,
        ["config.phases[1], which takes steps 50 to 70", "config.phases[0].steps: 20 -> 50"],
    ),
    "a profile of no step": ({}, ["--profile=3:5 begins at no step"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_config_is_shown_and_refused_where_it_cannot_go_on(
    alone, tmp_path, monkeypatch, name
):
    changes, expected = CHANGES[name]
    profile = None if changes else (3, 5)
    workdir = shutil.copytree(alone.workdir, tmp_path / "run")
    before = (workdir / "config.json").read_text()
    config = load_config(runs.ROOT / "tests" / "tiny.py:restarts")
    config.update_from_flattened_dict(changes)
    on_one_device(monkeypatch)
    said, progress = [], Progress(quiet=True)
    monkeypatch.setattr(progress, "say", said.append)
    refused = "resuming at step 40" not in expected
    with pytest.raises(UserError) if refused else contextlib.nullcontext() as error:
        train(config, workdir, progress, profile)
    text = "\n".join([*said, str(error and error.value)])
    for words in expected:
        assert words in text
    # A finished run is not trained again.
    assert runs.metrics_of(workdir) == runs.metrics_of(alone.workdir)
    # A refused config does not take the place of the one that the checkpoints belong to.
    written = (workdir / "config.json").read_text()
    assert (written == before) == refused


@pytest.fixture
def logging():
    """(step, metrics) -> what a run writes of them, and what it says."""
    config, said, written = load_config(runs.ROOT / "tests" / "tiny.py:restarts"), [], []
    config.max_skipped = 3
    progress = SimpleNamespace(say=said.append, update=lambda text, final: None)
    training = SimpleNamespace(
        warned=False,
        run=SimpleNamespace(progress=progress, config=config),
        checkpoints=SimpleNamespace(check=lambda: None),
        writer=SimpleNamespace(write=lambda step, values: written.append(values)),
    )
    phase = make_phases(config, 100)[1]

    def log(step, **metrics):
        arrays = {name: jax.numpy.float32(value) for name, value in metrics.items()}
        _Training._log(training, phase, step, arrays, {"phase": 1.0}, 7)
        return written[-1], said

    return log


def test_a_loss_that_stays_nan_is_refused(logging):
    written, _ = logging(24, loss=np.nan, skipped=2.0)
    assert written["train/skipped"] == 2.0 and written["train/phase"] == 1.0
    with pytest.raises(UserError, match="3 steps in a row, up to step 25.* 7 records could not"):
        logging(25, loss=np.nan, skipped=3.0)


def test_targets_that_are_positive_nearly_everywhere_are_warned_of_once(logging):
    for step, fraction in enumerate((0.59, 0.72, 0.9), start=21):
        written, said = logging(step, loss=1.0, skipped=0.0, mask_target_fraction=fraction)
        assert written["train/mask_target_fraction"] == pytest.approx(fraction)
    assert len(said) == 1 and "step 22: 72 % of the patches are positive" in said[0]


# ---- the work directory


def test_a_work_directory_is_for_one_job_at_a_time(tmp_path):
    with locked(tmp_path / "run"):
        with pytest.raises(RestartError, match=f"another job .*run .process {os.getpid()} on"):
            with locked(tmp_path / "run"):
                pass
    with locked(tmp_path / "run"):
        pass
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="file/run cannot be written"):
        with locked(tmp_path / "file" / "run"):
            pass


def test_changes_are_listed_by_field(tiny_config):
    before = plain(tiny_config)
    tiny_config.optimizer.learning_rate.peak = 2e-3
    tiny_config.model.image.grid = (2, 2)
    tiny_config.extra = "new"
    assert changed_fields(before, plain(tiny_config)) == [
        'config.extra: absent -> "new"',
        "config.model.image.grid: [4, 4] -> [2, 2]",
        "config.optimizer.learning_rate.peak: 0.001 -> 0.002",
    ]
    phases = [{"steps": 3}, {"steps": 4}], [{"steps": 3}, {"steps": 5}, {"steps": 6}]
    assert changed_fields(*phases, "phases") == [
        "phases[1].steps: 4 -> 5",
        'phases[2]: absent -> {"steps": 6}',
    ]
