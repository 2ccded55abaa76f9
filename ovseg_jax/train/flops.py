"""Counting the floating-point operations of a program, before it is compiled.

XLA's own count takes the body of a loop once, and the layers here are loops.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from ml_collections import ConfigDict


def matmul_flops(function: Callable[..., Any], *arguments: Any) -> int:
    """Operations of all matrix products of `function(*arguments)`, on all devices together.

    A product [n, k] x [k, m] counts 2 n k m. Everything else is left out, as is usual for
    model-FLOPs utilization. What rematerialization makes again counts again.

    Args:
      arguments: arrays or shapes.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Jaxpr) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
    name, inner = equation.primitive.name, list(_programs(equation.params.values()))
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        out = math.prod(equation.outvars[0].aval.shape)
        return 2 * out * math.prod(left[axis] for axis in contracted)
    if name == "cond":
        return max(map(_count, inner))
    times = 1
    if name == "scan":
        times = equation.params["length"]
    elif name == "shard_map":
        times = equation.params["mesh"].size  # inside, shapes are those of one device
    return times * sum(map(_count, inner))


def _programs(values: Any) -> Iterator[Jaxpr]:
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _programs(value)


def without_repetition(config: ConfigDict) -> ConfigDict:
    """A run's config whose step does nothing twice: what a step's model FLOPs are counted in."""
    plain = config.copy_and_resolve_references()
    plain.model.image.remat = plain.model.text.remat = "none"
    plain.accumulation.micro_batches = 1
    return plain
