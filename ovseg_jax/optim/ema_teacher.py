"""The EMA teacher, kept in the optimizer state (Sec. 3.2, "momentum model").

`ema_teacher` leaves the updates alone and tracks the parameters they lead to. It must come last in
the chain, where ``params + updates`` is what the model will be. (`optax.ema` averages *updates*.)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ovseg_jax.optim.groups import flatten, nest


class EmaTeacherState(NamedTuple):
    """`params`: the averaged parameters, a nested dict with the student's paths."""

    params: dict[str, Any]


def ema_teacher(decay: float, prefix: str) -> optax.GradientTransformation:
    """Tracks ``t <- decay * t + (1 - decay) * (p + u)`` for the parameters under `prefix`.

    Args:
      decay: 0.99 in the paper.
      prefix: path prefix of the tracked parameters, e.g. "image_encoder/".
    """

    def select(tree: Any) -> dict[str, Any]:
        return {path: x for path, x in flatten(tree).items() if path.startswith(prefix)}

    def init(params: Any) -> EmaTeacherState:
        # A copy: aliasing the parameters would donate one buffer twice.
        return EmaTeacherState(
            nest(jax.tree.map(lambda x: jnp.array(x, copy=True), select(params)))
        )

    def update(updates: Any, state: EmaTeacherState, params: Any = None) -> tuple:
        old, change, average = select(params), select(updates), flatten(state.params)
        new = {k: decay * average[k] + (1.0 - decay) * (old[k] + change[k]) for k in average}
        return updates, EmaTeacherState(nest(new))

    return optax.GradientTransformation(init, update)


def _is_teacher(node: Any) -> bool:
    return isinstance(node, EmaTeacherState)


def find_teacher(opt_state: Any) -> dict[str, Any]:
    """The teacher's parameters inside an optimizer state, which must hold exactly one teacher."""
    (teacher,) = filter(_is_teacher, jax.tree.leaves(opt_state, is_leaf=_is_teacher))
    return teacher.params


def replace_teacher(opt_state: Any, params: dict[str, Any]) -> Any:
    """The optimizer state with the teacher's parameters replaced."""
    return jax.tree.map(
        lambda x: EmaTeacherState(params) if _is_teacher(x) else x, opt_state, is_leaf=_is_teacher
    )
