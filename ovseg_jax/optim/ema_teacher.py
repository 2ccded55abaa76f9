"""The EMA teacher, kept in the optimizer state (Sec. 3.2, "momentum model").

It averages what is trained; `teacher_of` adds what is frozen.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ovseg_jax.optim.groups import flatten, join, nest, split


class EmaTeacherState(NamedTuple):
    """`params`: the averaged parameters, a nested dict with the student's paths."""

    params: dict[str, Any]


def ema_teacher(decay: float, prefix: str) -> optax.GradientTransformation:
    """Tracks ``t <- decay * t + (1 - decay) * (p + u)`` for the parameters under a path prefix.

    The "momentum model" of Sec. 3.2. It leaves the updates alone, and must come last in the chain,
    where ``p + u`` is what the model will be. (`optax.ema` averages *updates*.)
    """

    def select(tree: Any) -> dict[str, Any]:
        return {path: x for path, x in flatten(tree).items() if path.startswith(prefix)}

    def init(params: Any) -> EmaTeacherState:
        # A copy: aliasing the parameters would donate one buffer twice.
        copies = jax.tree.map(lambda x: jnp.array(x, copy=True), select(params))
        return EmaTeacherState(nest(copies))

    def update(updates: Any, state: EmaTeacherState, params: Any = None) -> tuple:
        old, change, average = select(params), select(updates), flatten(state.params)
        new = {k: decay * average[k] + (1.0 - decay) * (old[k] + change[k]) for k in average}
        return updates, EmaTeacherState(nest(new))

    return optax.GradientTransformation(init, update)


def is_teacher(node: Any) -> bool:
    """Whether a part of an optimizer state is the teacher's."""
    return isinstance(node, EmaTeacherState)


def find_teacher(opt_state: Any) -> dict[str, Any]:
    """The teacher's parameters inside an optimizer state, which must hold exactly one teacher."""
    (teacher,) = filter(is_teacher, jax.tree.leaves(opt_state, is_leaf=is_teacher))
    return teacher.params


def teacher_of(state: Any, frozen: tuple[str, ...]) -> dict[str, Any]:
    """The teacher's visual encoder, complete: frozen parameters come from the online model.

    `state` is a train state with these frozen patterns.
    """
    _, held = split(state.params, frozen)
    average = find_teacher(state.opt_state)["image_encoder"]
    return join(held.get("image_encoder", {}), average)
