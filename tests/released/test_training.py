"""The released model's training step, with its Gumbel noise fed in.

Compared by |ours - theirs| / |theirs| (Euclidean norms over the array). Limits: 1e-5 for values,
losses, running statistics and parameters after a step, 1e-4 for gradients; more where the released
code's own float32 is that far from its float64. Groups that patches are assigned to, and the number
of calls that a batch norm has counted, must be equal.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from reference.batches import replace_teacher
from reference.steps import loss_terms

from ovseg_jax.optim.ema_teacher import teacher_of
from ovseg_jax.optim.optimizer import make_optimizer
from ovseg_jax.train.step import new_state, step_rngs, train_step
from ovseg_jax.weights.released import extra_tensors, to_released
from released.arrays import ReleasedSet, relative, sets_with

VALUES, GRADIENTS = 1e-5, 1e-4
# After a second step, which inherits what rounding made of gradients that are zero.
LOOSE = 2e-3
LOSSES = {"matching": "contrastive", "entity": "entity", "mask": "mask"}
# Entries of Adam's first step whose clipped gradient is smaller than this are rounding noise over
# rounding noise: their step is plus or minus the learning rate.
SMALLEST = 1e-6


def losses_and_gradients(case, params, teacher, statistics, dual):
    """({released name of a loss: value}, {the same: gradient}, running statistics afterwards)."""
    _, mask_weight = case.weights_of_losses()

    def terms(params):
        given = (case.model, params, teacher, case.batch(), case.loss_config(dual))
        options = {"mask_weight": mask_weight, "text_dropout": True, "rngs": step_rngs(0, 0)}
        options |= {"mesh": None, "statistics": statistics, "noise": case.noise(dual)}
        loss, (metrics, after) = loss_terms(*given, **options)
        return {name: metrics[ours] for name, ours in LOSSES.items()}, (loss, after)

    values, pull, (loss, after) = jax.vjp(terms, params, has_aux=True)
    zero = {name: jnp.zeros(()) for name in values}
    pulled = {name: pull({**zero, name: jnp.ones(())})[0] for name in values}
    entity_weight, mask_weight = case.weights_of_losses()
    pulled["total"] = jax.tree.map(
        lambda a, b, c: a + entity_weight * b + mask_weight * c, *(pulled[name] for name in LOSSES)
    )
    return {**values, "loss": loss}, pulled, after


def released_names(case, tree, statistics=None, teacher=None):
    """Arrays of the model's shape under released names."""
    statistics = case.statistics if statistics is None else statistics
    return to_released(tree, statistics, case.config, teacher)


def statistic_errors(case, after, recorded, prefix):
    """Relative error of the running statistics; their counts must be equal."""
    ours, errors = released_names(case, case.params, after), {}
    for key, theirs in recorded.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            errors[name] = relative(ours[name], theirs)
            if name.endswith("num_batches_tracked"):
                assert ours[name] == theirs, name
    return errors


def gradient_errors(case, pulled, recorded):
    """Relative error of each recorded gradient "loss|parameter[|dual_..]".

    A gradient that is zero in exact arithmetic (a bias in front of a softmax or a batch norm) is
    compared with the size of the whole gradient instead of its own.
    """
    names = {loss: released_names(case, tree) for loss, tree in pulled.items()}
    whole = {
        loss: np.sqrt(sum(np.sum(np.float64(x) ** 2) for x in flatten_dict(tree, sep="/").values()))
        for loss, tree in pulled.items()
    }
    zero = set(case.meta["zero_gradient_params"])
    errors = {}
    for key, theirs in recorded.items():
        loss, name = key.split("|")[:2]
        ours = names[loss][name]
        if name in zero:
            errors[key] = float(np.linalg.norm(np.float64(ours) - theirs) / whole[loss])
        else:
            errors[key] = relative(ours, theirs)
    return errors


def optimizer_steps(case, count):
    """States after `count` train steps on the recorded batch, and the metrics of each."""
    config = case.run_config()
    _, mask_weight = case.weights_of_losses()
    tx = make_optimizer(config.optimizer, case.params)
    rate = jnp.float32(case.meta["optimizer"]["base_lr"])

    def start(params, statistics, teacher):
        state = new_state(params, tx, (), statistics)
        average = {"image_encoder": jax.tree.map(jnp.array, teacher)}
        return state.replace(opt_state=replace_teacher(state.opt_state, average))

    state = jax.jit(start)(case.params, case.statistics, case.teacher)
    options = {"model": case.model, "tx": tx, "rate": lambda _: rate, "config": config}
    options |= {"mask_weight": mask_weight, "frozen": (), "mesh": None}
    step = jax.jit(lambda state, batch, noise: train_step(state, batch, noise=noise, **options))
    states, history = [], []
    for _ in range(count):
        state, metrics = step(state, case.batch(), case.noise(False))
        states.append(state)
        history.append(metrics)
    return states, history


def parameter_errors(case, state, recorded, prefix, gradients):
    """Relative error of each recorded parameter after a step, the teacher's too.

    Parameters whose gradient is zero in exact arithmetic are left out, and entries whose clipped
    gradient does not count (see `SMALLEST`). Parameters that the released code never trains are
    among those compared: they must not have moved.

    Args:
      gradients: the recorded gradients of the first step, "total|parameter".
    """
    ours = released_names(case, state.params, state.batch_stats, teacher_of(state, ()))
    ours |= extra_tensors(case.tensors)
    clip = min(1.0, case.meta["clip"] / (case.meta["total_grad_norm_dual_off"] + 1e-6))
    errors = {}
    for key, theirs in recorded.items():
        if not key.startswith(prefix):
            continue
        name = key.removeprefix(prefix)
        online = name.replace("img_encoder_momentum", "img_encoder")
        if online in case.meta["zero_gradient_params"]:
            continue
        counts = np.ones(theirs.shape, bool)
        if f"total|{online}" in gradients:
            counts = np.abs(gradients[f"total|{online}"]) * clip > SMALLEST
        if online in case.meta["zero_gradient_slices"]:
            start, stop = case.meta["zero_gradient_slices"][online]["key_slice"]
            counts[start:stop] = False
        if counts.any():
            errors[name] = relative(np.asarray(ours[name])[counts], theirs[counts])
    return errors


@pytest.fixture(scope="module", params=sets_with("optim_step2.npz"))
def case(request):
    return ReleasedSet(*request.param)


@pytest.fixture(scope="module")
def steps(case):
    return optimizer_steps(case, 2)


def run(case, function, *args):
    jitted = jax.jit(lambda p, t, s: function(case, p, t, s, *args))
    return jitted(case.params, case.teacher, case.statistics)


@pytest.mark.parametrize("dual", ["off", "on"])
def test_losses_gradients_and_running_statistics(case, dual):
    recorded = case.file(f"train_dual_{dual}")
    values, pulled, after = run(case, losses_and_gradients, dual == "on")
    losses = {f"loss/{key}": relative(x, recorded[f"loss/{key}"]) for key, x in values.items()}
    case.check(f"train_{dual}", losses, VALUES)
    prefix = "buffers_after/"
    errors = statistic_errors(case, after, recorded, prefix)
    assert len(errors) == 9
    case.check(f"train_{dual}", {prefix + key: x for key, x in errors.items()}, VALUES)
    total = case.file(f"grads_dual_{dual}")
    case.check(f"grads_{dual}", gradient_errors(case, pulled, total), GRADIENTS)
    suffix = f"|dual_{dual}"
    each = {
        key.removesuffix(suffix): x
        for key, x in case.file("grads_per_loss").items()
        if key.endswith(suffix)
    }
    case.check(f"grads_{dual}", gradient_errors(case, pulled, each), GRADIENTS)


def test_first_optimizer_step_and_teacher(case, steps):
    states, history = steps
    recorded, gradients = case.file("optim_step1"), case.file("grads_dual_off")
    names = {**LOSSES, "loss": "loss"}
    errors = {
        f"step1/losses/{key}": relative(history[0][ours], recorded[f"step1/losses/{key}"])
        for key, ours in names.items()
    }
    norm = "step1/grad_norm_before_clip"
    case.check("optim", {**errors, norm: relative(history[0]["grad_norm"], recorded[norm])}, VALUES)
    prefix = "param_after_step1|"
    errors = parameter_errors(case, states[0], recorded, prefix, gradients)
    case.check("step1", errors, VALUES)
    teacher = case.file("optim_ema_step1")
    errors = parameter_errors(case, states[0], teacher, prefix, gradients)
    case.check("ema", errors, VALUES)


def test_second_optimizer_step(case, steps):
    states, history = steps
    recorded, first = case.file("optim_step2"), case.file("optim_step1")
    for key, ours in LOSSES.items():
        assert relative(history[1][ours], first[f"step2/losses/{key}"]) < LOOSE, key
    errors = parameter_errors(
        case, states[1], recorded, "param_after_step2|", case.file("grads_dual_off")
    )
    case.check("step2", errors, LOOSE)
