"""The program of a run, without its data: state and train step of each phase, from the config."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from flax import linen as nn
from ml_collections import ConfigDict

from ovseg_jax.models.ovsegmentor import OVSegmentor
from ovseg_jax.optim import groups
from ovseg_jax.optim.optimizer import make_optimizer
from ovseg_jax.sharding import AnyMesh
from ovseg_jax.train.phases import Phase, rate_at
from ovseg_jax.train.state import TrainState, new_state, state_shardings
from ovseg_jax.train.step import compile_step, train_step
from ovseg_jax.weights.initialize import init_params, init_statistics


@dataclass
class Program:
    """What is compiled. Nothing in it needs data, weights or the devices of the mesh."""

    config: ConfigDict
    mesh: AnyMesh
    model: OVSegmentor
    phases: list[Phase]
    param_shardings: Any

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.phases[-1].last

    def abstract_params(self) -> dict[str, Any]:
        """Shapes of all parameters."""
        return self._params

    @functools.cached_property
    def _params(self) -> dict[str, Any]:
        return nn.unbox(boxed_params(self.model))

    @functools.cached_property
    def _layouts(self) -> dict[int, tuple[TrainState, TrainState]]:
        return {}

    def optimizer(self, phase: Phase, params: Any) -> Any:
        """The optax chain of a phase; `params` may be abstract."""
        return make_optimizer(self.config.optimizer, *groups.split(params, phase.frozen))

    def state_layout(self, phase: Phase) -> tuple[TrainState, TrainState]:
        """(abstract state, shardings) of a phase; made once, since tracing takes a second."""
        if phase.index not in self._layouts:
            params = self.abstract_params()
            tx = self.optimizer(phase, params)
            abstract = jax.eval_shape(
                lambda p: new_state(p, tx, phase.frozen, init_statistics(self.model)), params
            )
            shardings = state_shardings(abstract, self.param_shardings, self.mesh)
            self._layouts[phase.index] = abstract, shardings
        return self._layouts[phase.index]

    def step(self, phase: Phase) -> Callable[..., Any]:
        """The train step of a phase, not yet jitted: (state, batch) -> (state, metrics)."""
        return functools.partial(
            train_step,
            model=self.model,
            tx=self.optimizer(phase, self.abstract_params()),
            rate=lambda s: rate_at(s, self.config, phase, self.total),
            config=self.config,
            mask_weight=phase.mask_weight,
            frozen=phase.frozen,
            mesh=self.mesh,
            erase=phase.erase,
        )

    def compiled_step(self, phase: Phase) -> Callable[..., Any]:
        """The jitted train step of a phase."""
        return compile_step(self.step(phase), self.state_layout(phase)[1], self.mesh)


def boxed_params(model: OVSegmentor) -> Any:
    """Shapes of all parameters with their logical axis names."""
    return jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
