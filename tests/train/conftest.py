"""The train step of the tiny model, compiled once per (mesh, phase, matching) for the session."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest
import runs
from reference.same_steps import take_steps

from ovseg_jax import sharding
from ovseg_jax.optim.groups import split
from ovseg_jax.optim.optimizer import learning_rate, make_optimizer
from ovseg_jax.train.state import new_state, state_shardings
from ovseg_jax.train.step import compile_step, train_step

MESHES = {"one": (1, 1, 1), "data": (8, 1, 1), "fsdp": (2, 4, 1), "mixed": (2, 2, 2)}
STEPS = 5


@dataclass
class Steps:
    """One compiled train step and what it needs."""

    mesh: Any
    shardings: Any
    start: Any
    compiled: Any

    def place(self, state=None):
        """A state (NumPy) on the devices; the initial one by default."""
        return jax.device_put(self.start if state is None else state, self.shardings)

    def __call__(self, state, batch):
        """One step; the state that was passed in is donated."""
        return self.compiled(state, sharding.put_batch(batch, self.mesh))


@pytest.fixture(scope="session")
def make_steps(shared_tiny_config, tiny_model, tiny_boxed, tiny_params):
    """Makes `Steps` for the tiny model; the same arguments give the same object."""

    @functools.cache
    def make(mesh_name, mask_weight, matching, frozen):
        shape = MESHES[mesh_name]
        devices = jax.devices()[: int(np.prod(shape))]
        mesh = sharding.make_mesh(*shape, devices=devices)
        run_config = shared_tiny_config.copy_and_resolve_references()
        run_config.loss.matching = matching
        tx = make_optimizer(run_config.optimizer, *split(tiny_params, frozen))
        start = jax.device_get(jax.jit(lambda p: new_state(p, tx, frozen))(tiny_params))
        step = functools.partial(
            train_step,
            model=tiny_model,
            tx=tx,
            rate=lambda s: learning_rate(
                s, run_config.optimizer.learning_rate, first=0, total=2 * STEPS
            ),
            config=run_config,
            mask_weight=mask_weight,
            frozen=frozen,
            mesh=mesh,
        )
        shardings = state_shardings(start, sharding.parameter_shardings(tiny_boxed, mesh), mesh)
        return Steps(mesh, shardings, start, compile_step(step, shardings, mesh))

    # The cache tells a default from the same value given.
    return lambda mesh_name, mask_weight, matching="host", frozen=(): make(
        mesh_name, mask_weight, matching, frozen
    )


@pytest.fixture(scope="session")
def run_steps(make_steps):
    """Runs `STEPS` steps over batches 0, 1, ...; the same arguments give the same `Run`."""

    @functools.cache
    def run(mesh_name, mask_weight, matching="host"):
        steps = make_steps(mesh_name, mask_weight, matching)
        return take_steps(steps, steps.place(), STEPS, second=mask_weight > 0)

    return run


@dataclass
class Alone:
    """A finished run of `runs.CONFIG` that nothing happened to, and what it said."""

    workdir: Any
    said: str


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """`Alone`, with a trace of its steps 3 to 5. Not to be changed."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    return Alone(workdir, runs.train(workdir, "--profile=3:5"))
