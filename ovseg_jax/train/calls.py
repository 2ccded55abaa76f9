"""The model as a step calls it: parameters at hand, running statistics carried along."""

from collections.abc import Mapping
from typing import Any

import jax

from ovseg_jax.models.ovsegmentor import OVSegmentor
from ovseg_jax.models.projector import STATISTICS

Params = Mapping[str, Any]


class Calls:
    """Calls methods of a model one after the other.

    Where the model has batch norms, calls in training move their running statistics; each call
    starts from what the one before left, as if the model held a state. Use one object in one trace.

    Args:
      model, params: the module and its parameters.
      statistics: the running statistics at the start; {} where the model keeps none.

    Attributes:
      statistics: the running statistics after the calls so far; no gradient flows into them.
    """

    def __init__(self, model: OVSegmentor, params: Params, statistics: Params):
        self.model, self.params, self.statistics = model, params, statistics

    def __call__(
        self,
        method: str,
        *args: Any,
        rngs: Mapping[str, jax.Array] | None = None,
        params: Params | None = None,
    ) -> Any:
        """`model.method(*args)`, with other parameters where they are given."""
        variables = {"params": self.params if params is None else params}
        if not self.statistics:
            return self.model.apply(variables, *args, method=method, rngs=rngs)
        variables[STATISTICS] = self.statistics
        result, changed = self.model.apply(
            variables, *args, method=method, rngs=rngs, mutable=[STATISTICS]
        )
        self.statistics = changed[STATISTICS]
        return result
