"""Floating-point operations of a step, counted in its matrix products.

XLA's own cost analysis counts the body of a loop once, however often it runs, and the layers of
the model are such loops: it would miss eleven of twelve.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def matmul_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Multiplications and additions in all matrix products and convolutions of a function.

    What is computed again in the backward pass (rematerialization) counts again only where it was
    traced so: give a function without it for the model's own FLOPs.

    Args:
      function: traced, not run. arguments: arrays or shapes.
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of_jaxpr(jaxpr: Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            total += _of_product(equation)
        elif name == "conv_general_dilated":
            total += _of_convolution(equation)
        elif name == "cond":
            total += max(_of_jaxpr(branch.jaxpr) for branch in equation.params["branches"])
        else:
            times = equation.params["length"] if name == "scan" else 1
            if name == "shard_map":
                times = equation.params["mesh"].size
            total += times * sum(_of_jaxpr(inner) for inner in _inside(equation))
    return total


def _inside(equation: Any) -> Iterator[Jaxpr]:
    for value in equation.params.values():
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def _of_product(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _of_convolution(equation: Any) -> float:
    kernel = equation.invars[1].aval.shape
    outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / outputs
