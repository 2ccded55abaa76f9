"""The train step of the tiny model, compiled once per (mesh, phase) for the session."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest
import runs
from reference.steps import steps_of, take_steps

from ovseg_jax import sharding
from ovseg_jax.optim.optimizer import learning_rate

MESHES = {"one": (1, 1, 1), "data": (8, 1, 1), "fsdp": (2, 4, 1), "mixed": (2, 2, 2)}
STEPS = 5


@pytest.fixture(scope="session")
def make_steps(shared_tiny_config, tiny_model, tiny_params):
    """Makes `Steps` for the tiny model; the same arguments give the same object."""

    @functools.cache
    def make(mesh_name, mask_weight, frozen=()):
        shape = MESHES[mesh_name]
        mesh = sharding.make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
        spec = shared_tiny_config.optimizer.learning_rate
        rate = functools.partial(learning_rate, config=spec, first=0, total=2 * STEPS)
        options = (mesh, mask_weight, rate, frozen)
        return steps_of(tiny_model, shared_tiny_config, tiny_params, *options)

    return make


@pytest.fixture(scope="session")
def run_steps(make_steps):
    """Runs `STEPS` steps over batches 0, 1, ...; the same arguments give the same `Run`."""

    @functools.cache
    def run(mesh_name, mask_weight):
        return take_steps(make_steps(mesh_name, mask_weight), STEPS, second=mask_weight > 0)

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
