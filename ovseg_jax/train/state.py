"""The train state: what a checkpoint holds, and how one phase hands it to the next."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from ovseg_jax import sharding
from ovseg_jax.models.build import init_params, init_statistics
from ovseg_jax.models.ovsegmentor import OVSegmentor
from ovseg_jax.optim import groups
from ovseg_jax.optim.ema_teacher import find_teacher
from ovseg_jax.sharding import AnyMesh


@struct.dataclass
class TrainState:
    """One training run at one step; or shapes or shardings in place of its arrays."""

    step: Any  # steps taken, int32, skipped ones included; also the position in the data
    skipped: Any  # steps in a row, int32, whose loss or gradient was not finite
    params: dict[str, Any]  # frozen ones too
    opt_state: Any  # moments and EMA teacher of the trainable parameters
    batch_stats: Any  # running statistics of batch norms; {} where the model has none


def new_state(
    params: Mapping[str, Any],
    tx: optax.GradientTransformation,
    frozen: tuple[str, ...],
    batch_stats: Mapping[str, Any] | None = None,
) -> TrainState:
    """A state at step 0. To be called under jit, so that no buffer is shared."""
    trainable, _ = groups.split(params, frozen)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, zero, dict(params), tx.init(trainable), dict(batch_stats or {}))


def abstract_params(model: OVSegmentor, mesh: AnyMesh) -> dict[str, Any]:
    """Shapes, dtypes and shardings of all parameters."""
    boxed = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    return sharding.laid_out(boxed, mesh)


def abstract_state(
    model: OVSegmentor, tx: optax.GradientTransformation, frozen: tuple[str, ...], mesh: AnyMesh
) -> TrainState:
    """Shapes, dtypes and shardings of the state of a phase with this optimizer and frozen patterns.

    Moments and teacher lie where their parameters do.
    """

    def boxed(key: jax.Array) -> TrainState:
        return new_state(init_params(model, key), tx, frozen, init_statistics(model))

    return sharding.laid_out(jax.eval_shape(boxed, jax.random.key(0)), mesh)


def teacher_of(state: TrainState, frozen: tuple[str, ...]) -> dict[str, Any]:
    """The teacher's visual encoder, complete: frozen parameters come from the online model."""
    _, held = groups.split(state.params, frozen)
    average = find_teacher(state.opt_state)["image_encoder"]
    return groups.join(held.get("image_encoder", {}), average)


def next_phase_state(
    state: TrainState,
    tx: optax.GradientTransformation,
    frozen: tuple[str, ...],
    *,
    optimizer: str,
    teacher: str,
) -> TrainState:
    """The state at the start of a phase (tx, frozen), from that at the end of the one before.

    Args:
      optimizer: "continue" keeps the moments of parameters that stay trainable, "fresh" none.
      teacher: "keep" goes on averaging, "reset" starts at the online model. Parameters that were
        frozen before start there in either case.
    """
    fresh = new_state(state.params, tx, frozen, state.batch_stats)
    known = {jax.tree_util.keystr(p): x for p, x in jax.tree.leaves_with_path(state.opt_state)}

    def carried(path: tuple, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path)
        of_teacher = ".params" in name  # the field of `EmaTeacherState`
        kept = teacher == "keep" if of_teacher else optimizer == "continue"
        return known.get(name, leaf) if kept else leaf

    opt_state = jax.tree_util.tree_map_with_path(carried, fresh.opt_state)
    return fresh.replace(step=state.step, skipped=state.skipped, opt_state=opt_state)
