"""Train steps of small models: made, taken, and compared (equal but for rounding)."""

import functools
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from ovseg_jax import sharding
from ovseg_jax.models.build import init_statistics
from ovseg_jax.optim.ema_teacher import find_teacher
from ovseg_jax.optim.groups import flatten, split
from ovseg_jax.optim.optimizer import make_optimizer
from ovseg_jax.train.loss import joint_loss, per_example_outputs
from ovseg_jax.train.step import (
    abstract_state,
    compile_step,
    new_state,
    step_rngs,
    train_step,
)
from reference.batches import adam_of, make_batch

# Softmax takes no notice of what is added to all its logits: these have a gradient of zero but
# for rounding, which Adam blows up to full steps.
NO_GRADIENT = ("attention/key/bias", "binding/query/bias", "binding/group_norm/bias")


@dataclass
class Steps:
    """A train step and what it needs."""

    mesh: Any
    shardings: Any
    start: Any
    jitted: Any
    _programs: dict = field(default_factory=dict)

    def place(self, state=None):
        """A state (NumPy) on the devices; the initial one by default."""
        return jax.device_put(self.start if state is None else state, self.shardings)

    def __call__(self, state, batch):
        """One step; the state that was passed in is donated."""
        batch = sharding.put_batch(batch, self.mesh)
        return self.program(batch)(state, batch)

    def program(self, batch):
        """The step, compiled once for each kind of batch."""
        fields = tuple(sorted(batch))
        if fields not in self._programs:
            self._programs[fields] = self.jitted.lower(self.place(), batch).compile()
        return self._programs[fields]


def make_step(model, config, tx, mesh, mask_weight, rate=None, frozen=()):
    """The train step of a model, not yet jitted."""
    return functools.partial(
        train_step,
        model=model,
        tx=tx,
        rate=rate or (lambda step: np.float32(1e-3) + 0 * step.astype(np.float32)),
        config=config,
        mask_weight=mask_weight,
        frozen=frozen,
        mesh=mesh,
    )


def steps_of(model, config, params, mesh, mask_weight, rate=None, frozen=()):
    """`Steps` of a model on a mesh, from these parameters; its rate is 1e-3 where none is given."""
    tx = make_optimizer(config.optimizer, *split(params, frozen))
    make = jax.jit(lambda p: new_state(p, tx, frozen, init_statistics(model)))
    abstract = abstract_state(model, tx, frozen, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    step = make_step(model, config, tx, mesh, mask_weight, rate, frozen)
    return Steps(mesh, shardings, jax.device_get(make(params)), compile_step(step, shardings, mesh))


def loss_terms(model, params, teacher, batch, config, *, mask_weight, mesh=None, **options):
    """Eq. 13 on one batch, as a step computes it: (loss, (metrics, running statistics)).

    Args:
      See `per_example_outputs`.
    """
    outputs, statistics = per_example_outputs(
        model, params, teacher, batch, config, mask_weight=mask_weight, mesh=mesh, **options
    )
    scale = model.apply({"params": params}, method="logit_scale")
    loss, metrics = joint_loss(scale, outputs, batch, config, mask_weight=mask_weight)
    return loss, (metrics, statistics)


def make_terms(model, config, mask_weight=0.0):
    """(params, teacher, batch) -> loss and metrics as a step computes them, without dropout.

    Args:
      config: a ``config.loss``.
    """
    options = {"mask_weight": mask_weight, "text_dropout": False, "rngs": step_rngs(0, 0)}

    def terms(params, teacher, batch):
        loss, (metrics, _) = loss_terms(model, params, teacher, batch, config, **options)
        return loss, metrics

    return terms


@dataclass
class Run:
    """Some steps from an initial state: metrics of each, first moments after the first (they are
    the clipped gradient times 1 - b1), and the last state."""

    metrics: list[dict[str, float]]
    moments: dict[str, np.ndarray]
    last: Any


def take_steps(steps, count, second):
    """`Run` of `count` steps over batches 0, 1, ...."""
    state, history, moments = steps.place(), [], {}
    for index in range(count):
        state, metrics = steps(state, make_batch(index, second=second))
        history.append({name: float(value) for name, value in metrics.items()})
        if index == 0:
            moments = flatten(jax.device_get(adam_of(state).mu))
    return Run(history, moments, jax.device_get(state))


def assert_same(run, other, start, no_gradient=NO_GRADIENT):
    """Metrics of all steps, gradients, and at the end parameters, teacher, moments and statistics.

    Args:
      start: the parameters that both runs began with. no_gradient: ends of the paths of parameters
        whose gradient is mathematically zero.
    """
    for step, (a, b) in enumerate(zip(run.metrics, other.metrics, strict=True)):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, err_msg=f"{name} at {step}")
    last = [flatten(adam_of(one.last).mu) for one in (run, other)]
    for part, limit in (((run.moments, other.moments), 1e-3), (last, 1e-2)):
        assert part[0].keys() == part[1].keys()
        for path, a in part[0].items():
            if not path.endswith(no_gradient):
                apart = np.abs(a - part[1][path]).max()
                assert apart <= limit * np.abs(a).max() + 1e-8, f"{path}: {apart}"
    start = flatten(start)
    for part in (lambda s: s.params, lambda s: find_teacher(s.opt_state)):
        first, second = flatten(part(run.last)), flatten(part(other.last))
        assert first.keys() == second.keys()
        # Of the way gone, not entry by entry: Adam blows up single entries whose gradient is about
        # as small as rounding, too.
        apart = {
            path: np.linalg.norm(a - second[path]) / np.linalg.norm(a - start[path])
            for path, a in first.items()
            if not path.endswith(no_gradient)
        }
        assert max(apart.values()) < 0.01, sorted(apart.items(), key=lambda item: -item[1])[:9]
    statistics = [flatten(one.last.batch_stats) for one in (run, other)]
    assert statistics[0].keys() == statistics[1].keys()
    for path, a in statistics[0].items():
        np.testing.assert_allclose(
            a, statistics[1][path], rtol=1e-3, atol=1e-4 * np.abs(a).max(), err_msg=path
        )
