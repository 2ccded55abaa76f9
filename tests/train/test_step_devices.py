"""One device, eight, and meshes with every axis: the same losses, gradients and parameters."""

import numpy as np
import pytest

from ovseg_jax.optim.ema_teacher import find_teacher
from ovseg_jax.optim.groups import flatten

pytestmark = pytest.mark.slow

# Softmax takes no notice of what is added to all its logits: these have a gradient of zero but
# for rounding, which Adam blows up to full steps.
NO_GRADIENT = ("attention/key/bias", "binding/query/bias", "binding/group_norm/bias")


def compare(run, other, start):
    """`start` holds the parameters that both runs began with."""
    for step, (a, b) in enumerate(zip(run.metrics, other.metrics, strict=True)):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, err_msg=f"{name} at {step}")
    assert run.moments.keys() == other.moments.keys()
    for path, a in run.moments.items():
        if not path.endswith(NO_GRADIENT):
            limit = 1e-3 * np.abs(a).max() + 1e-8
            np.testing.assert_allclose(a, other.moments[path], atol=limit, err_msg=path)
    start = flatten(start)
    for part in (lambda s: s.params, lambda s: find_teacher(s.opt_state)):
        first, second = flatten(part(run.last)), flatten(part(other.last))
        assert first.keys() == second.keys()
        for path, a in first.items():
            # Of the way gone, not entry by entry: Adam blows up single entries whose gradient is
            # about as small as rounding, too.
            apart = np.linalg.norm(a - second[path]) / np.linalg.norm(a - start[path])
            assert apart < 0.01 or path.endswith(NO_GRADIENT), f"{path}: {apart}"


@pytest.mark.parametrize("mask_weight", [0.0, 0.1])
@pytest.mark.parametrize("mesh", ["one", "fsdp", "mixed"])
def test_the_mesh_changes_nothing(run_steps, tiny_params, mesh, mask_weight):
    compare(run_steps("data", mask_weight), run_steps(mesh, mask_weight), tiny_params)


@pytest.mark.parametrize("matching", ["device", "enumerate"])
def test_the_matching_backend_changes_nothing(run_steps, tiny_params, matching):
    compare(run_steps("data", 0.1), run_steps("data", 0.1, matching), tiny_params)


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
