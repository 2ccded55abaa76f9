"""One device, eight, and meshes with every axis: the same losses, gradients and parameters."""

import numpy as np
import pytest
from reference.same_steps import assert_same

from ovseg_jax.optim.groups import flatten

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("mask_weight", [0.0, 0.1])
@pytest.mark.parametrize("mesh", ["one", "fsdp", "mixed"])
def test_the_mesh_changes_nothing(run_steps, tiny_params, mesh, mask_weight):
    assert_same(run_steps("data", mask_weight), run_steps(mesh, mask_weight), tiny_params)


@pytest.mark.parametrize("matching", ["device", "enumerate"])
def test_the_matching_backend_changes_nothing(run_steps, tiny_params, matching):
    assert_same(run_steps("data", 0.1), run_steps("data", 0.1, matching), tiny_params)


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
