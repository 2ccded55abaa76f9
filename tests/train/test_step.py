"""The step: the same on every mesh; what it leaves alone after a non-finite loss, or frozen."""

import jax
import numpy as np
import pytest
from reference.batches import adam_of, make_batch, replace_teacher
from reference.steps import assert_same

from ovseg_jax.optim.groups import flatten, nest
from ovseg_jax.optim.optimizer import find_teacher
from ovseg_jax.train.step import step_rngs, teacher_of

FROZEN = ("^text_encoder/", "^image_encoder/(patch_embed|position)")


def with_nan(tree, path):
    flat = {name: np.array(leaf) for name, leaf in flatten(tree).items()}
    flat[path].flat[0] = np.nan
    return nest(flat)


def same(a, b):
    return all(
        np.array_equal(x, y, equal_nan=True)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def spoiled(cause, start):
    """A state and a batch whose loss or gradient is not a number."""
    batch = make_batch(0)
    if cause == "batch":
        batch["weight"][2] = np.nan
        return start, batch
    path = "image_encoder/second/layers/mlp/fc1/bias"
    return start.replace(params=with_nan(start.params, path)), batch


@pytest.mark.parametrize("cause", ["batch", "parameter"])
def test_a_non_finite_step_keeps_the_old_state_and_is_counted(make_steps, cause):
    steps = make_steps("data", 0.1)
    before, batch = spoiled(cause, steps.start)
    state = steps.place(before)
    for count in (1, 2):
        state, metrics = steps(state, batch)
        assert not np.isfinite(metrics["loss"])
        assert metrics["skipped"] == count == state.skipped
        assert state.step == count  # another batch next time
    after = jax.device_get(state)
    assert same(after.params, before.params)
    assert same(after.opt_state, before.opt_state)  # moments, their count, the teacher
    if cause == "batch":
        state, metrics = steps(state, make_batch(1))
        assert state.skipped == 0 and np.isfinite(metrics["loss"])
        assert adam_of(state).count == 1
        assert not same(jax.device_get(state.params), before.params)


def test_a_phase_without_the_mask_loss_runs_no_teacher(make_steps, run_steps):
    """Nothing changes where the teacher is spoiled; with the mask loss its targets vanish. (That
    such a phase reads no second image shows in that its batches have none.)"""

    def first_step(mask_weight):
        steps = make_steps("data", mask_weight)
        teacher = with_nan(find_teacher(steps.start.opt_state), "image_encoder/norm/bias")
        start = steps.start.replace(opt_state=replace_teacher(steps.start.opt_state, teacher))
        _, metrics = steps(steps.place(start), make_batch(0, second=mask_weight > 0))
        return jax.device_get(metrics)

    assert first_step(0.0) == run_steps("data", 0.0).metrics[0]
    assert first_step(0.1)["mask_target_fraction"] == 0
    assert run_steps("data", 0.1).metrics[0]["mask_target_fraction"] > 0


def test_frozen_parameters_have_no_moments_no_teacher_and_do_not_move(make_steps, tiny_params):
    steps = make_steps("data", 0.1, frozen=FROZEN)
    start = flatten(tiny_params)
    held = {p for p in start if p.startswith(("text_encoder/", "image_encoder/p"))}
    trained = set(start) - held
    adam = adam_of(steps.start)
    assert set(flatten(adam.mu)) == set(flatten(adam.nu)) == trained
    own = flatten(find_teacher(steps.start.opt_state))
    assert set(own) == {p for p in trained if p.startswith("image_encoder/")}
    state, metrics = steps(steps.place(), make_batch(0))
    state, metrics = steps(state, make_batch(1))
    assert np.isfinite(metrics["loss"]) and state.skipped == 0
    last = flatten(jax.device_get(state.params))
    assert {p for p in start if np.array_equal(last[p], start[p])} == held
    # What the teacher lacks it takes from the student, so that it is a whole encoder.
    whole = flatten(teacher_of(jax.device_get(state), FROZEN))
    assert {f"image_encoder/{p}" for p in whole} == {p for p in start if p.startswith("image_enc")}
    np.testing.assert_array_equal(whole["position"], start["image_encoder/position"])


def test_random_keys_depend_on_seed_stream_and_step_alone():
    drawn = {
        (seed, step, name): tuple(np.ravel(jax.random.key_data(key)))
        for seed in (0, 1)
        for step in (0, 1)
        for name, key in step_rngs(seed, step).items()
    }
    assert len(set(drawn.values())) == len(drawn) == 8
    again = step_rngs(1, np.int32(1))["dropout"]
    assert tuple(np.ravel(jax.random.key_data(again))) == drawn[1, 1, "dropout"]


# ---- one device, eight, and meshes with every axis


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "mask_weight"), [("one", 0.1), ("fsdp", 0.1), ("mixed", 0.1), ("mixed", 0.0)]
)
def test_the_mesh_changes_nothing(run_steps, tiny_params, mesh, mask_weight):
    assert_same(run_steps("data", mask_weight), run_steps(mesh, mask_weight), tiny_params)


@pytest.mark.slow
def test_the_parameters_moved_and_the_terms_are_there(run_steps, tiny_params):
    """Guards the comparisons above against comparing nothing with nothing."""
    plain, masked = run_steps("data", 0.0), run_steps("data", 0.1)
    assert {"contrastive", "entity"} < plain.metrics[0].keys()
    assert masked.metrics[0].keys() - plain.metrics[0].keys() == {"mask", "mask_target_fraction"}
    assert 0.01 < masked.metrics[0]["mask_target_fraction"] < 0.99
    start = flatten(tiny_params)
    for run in (plain, masked):
        still = [p for p, x in flatten(run.last.params).items() if np.array_equal(x, start[p])]
        assert not still, f"never updated: {still}"
        assert run.last.step == 5 and run.last.skipped == 0
    for name in ("loss", "grad_norm"):
        assert abs(plain.metrics[0][name] - masked.metrics[0][name]) > 1e-4
