"""Evaluation in the course of training: the best state, a phase that starts from it, errors."""

import jax
import numpy as np
import pytest
import runs

from ovseg_jax import sharding
from ovseg_jax.errors import UserError
from ovseg_jax.flags import load_config
from ovseg_jax.progress import Progress
from ovseg_jax.train import evaluations
from ovseg_jax.train.loop import train

EVERY = 2
# By step. Phase 1 has four steps.
SCORES = {2: 50.0, 4: 10.0, 6: 20.0}


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
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda **_: mesh)
    return config


@pytest.fixture
def scores(monkeypatch):
    """The real evaluation with the mIoU of `SCORES`; those made so far, and steps that fail."""
    real, made, failing = evaluations.calibrated, [], set()

    def calibrated(segmenter, tune, protocol, batch_size):
        step = EVERY * (len(made) + 1)
        if step in failing:
            failing.remove(step)
            raise UserError("no image")
        chosen, miou = real(segmenter, tune, protocol, batch_size)
        assert len(tune) == 4 and 0 <= miou <= 100
        made.append(step)
        return chosen, SCORES[step]

    monkeypatch.setattr(evaluations, "calibrated", calibrated)
    return made, failing


def test_a_best_state_is_kept_and_started_from_and_a_failed_evaluation_costs_no_step(
    config, scores, tmp_path
):
    made, failing = scores
    failing.add(4)
    with pytest.raises(UserError, match="no image"):
        train(config, tmp_path, Progress(quiet=True))
    assert runs.checkpoints_of(tmp_path) == [2, 4]
    _, state = train(config, tmp_path, Progress(quiet=True))
    assert made == [2, 4, 6]
    lines = [(x["step"], x.get("eval/scenes_tune/miou")) for x in runs.metrics_of(tmp_path)]
    assert [line for line in lines if line[1]] == list(SCORES.items())
    assert [step for step, miou in lines if miou is None] == [1, 2, 3, 4, 5, 6, 7]
    best = runs.read_run(tmp_path, "best")
    assert best.position["step"] == 2 and int(state.step) == 7
    for one, other in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(best.state.params), strict=True
    ):
        np.testing.assert_array_equal(one, other)
