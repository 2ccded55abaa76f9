"""The released model's training step, with its Gumbel noise fed in.

Compared by |ours - theirs| / |theirs| (Euclidean norms over the array). Limits: 1e-5 for values,
losses, running statistics and parameters after a step, 1e-4 for gradients; more where the released
code's own float32 is that far from its float64. Groups that patches are assigned to, and the number
of calls that a batch norm has counted, must be equal.
"""

import jax
import pytest

from released import training
from released.arrays import ReleasedSet, relative, sets_with

VALUES, GRADIENTS = 1e-5, 1e-4
# After a second step, which inherits what rounding made of gradients that are zero.
LOOSE = 2e-3


@pytest.fixture(scope="module", params=sets_with("optim_step2.npz"))
def case(request):
    return ReleasedSet(*request.param)


@pytest.fixture(scope="module")
def steps(case):
    return training.optimizer_steps(case, 2)


def run(case, function, *args):
    jitted = jax.jit(lambda p, t, s: function(case, p, t, s, *args))
    return jitted(case.params, case.teacher, case.statistics)


@pytest.mark.parametrize("dual", ["off", "on"])
def test_losses_gradients_and_running_statistics(case, dual):
    recorded = case.file(f"train_dual_{dual}")
    values, pulled, after = run(case, training.losses_and_gradients, dual == "on")
    losses = {f"loss/{key}": relative(x, recorded[f"loss/{key}"]) for key, x in values.items()}
    case.check(f"train_{dual}", losses, VALUES)
    prefix = "buffers_after/"
    errors = training.statistic_errors(case, after, recorded, prefix)
    assert len(errors) == 9
    case.check(f"train_{dual}", {prefix + key: x for key, x in errors.items()}, VALUES)
    total = case.file(f"grads_dual_{dual}")
    case.check(f"grads_{dual}", training.gradient_errors(case, pulled, total), GRADIENTS)
    suffix = f"|dual_{dual}"
    each = {
        key.removesuffix(suffix): x
        for key, x in case.file("grads_per_loss").items()
        if key.endswith(suffix)
    }
    case.check(f"grads_{dual}", training.gradient_errors(case, pulled, each), GRADIENTS)


def test_first_optimizer_step_and_teacher(case, steps):
    states, history = steps
    recorded, gradients = case.file("optim_step1"), case.file("grads_dual_off")
    names = {**training.LOSSES, "loss": "loss"}
    errors = {
        f"step1/losses/{key}": relative(history[0][ours], recorded[f"step1/losses/{key}"])
        for key, ours in names.items()
    }
    norm = "step1/grad_norm_before_clip"
    case.check("optim", {**errors, norm: relative(history[0]["grad_norm"], recorded[norm])}, VALUES)
    prefix = "param_after_step1|"
    errors = training.parameter_errors(case, states[0], recorded, prefix, gradients)
    case.check("step1", errors, VALUES)
    teacher = case.file("optim_ema_step1")
    errors = training.parameter_errors(case, states[0], teacher, prefix, gradients)
    case.check("ema", errors, VALUES)


def test_second_optimizer_step(case, steps):
    states, history = steps
    recorded, first = case.file("optim_step2"), case.file("optim_step1")
    for key, ours in training.LOSSES.items():
        assert relative(history[1][ours], first[f"step2/losses/{key}"]) < LOOSE, key
    errors = training.parameter_errors(
        case, states[1], recorded, "param_after_step2|", case.file("grads_dual_off")
    )
    case.check("step2", errors, LOOSE)
