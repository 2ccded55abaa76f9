"""AdamW with clipping, parameter groups and the EMA teacher, in one optax chain."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from ovseg_jax.optim.ema_teacher import ema_teacher
from ovseg_jax.optim.groups import assign, flatten, nest
from ovseg_jax.shapes import Array

TEACHER_PREFIX = "image_encoder/"


def per_parameter(
    values: Mapping[str, Any], combine: Callable[[Array, Array, Any], Array]
) -> optax.GradientTransformation:
    """Stateless transformation ``u <- combine(u, p, value of the parameter)``."""

    def init(params: Any) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple:
        weights = flatten(params)
        changed = {k: combine(u, weights[k], values[k]) for k, u in flatten(updates).items()}
        return nest(changed), state

    return optax.GradientTransformation(init, update)


def scale_by_rate() -> optax.GradientTransformationExtraArgs:
    """Scales by minus the learning rate given at each update (``rate=...``)."""

    def init(params: Any) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(
        updates: Any, state: optax.EmptyState, params: Any = None, *, rate: Array, **_: Any
    ) -> tuple:
        del params
        return jax.tree.map(lambda u: -rate.astype(u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def standard_promotion(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` under JAX's standard dtype promotion: optax's bias correction mixes int32 and float."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple:
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(updates, state, params)

    return optax.GradientTransformation(tx.init, update)


def make_optimizer(
    config: ConfigDict, trainable: Mapping[str, Any], held: Mapping[str, Any] | None = None
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of the trainable parameters.

    Order: clip by global norm, Adam, decoupled weight decay, learning rate, EMA teacher. The rate
    is an argument of ``update`` (``rate=...``), so that it follows the run's step.

    Args:
      config: `b1`, `b2`, `eps`, `clip_norm` (0 for none), `weight_decay`, `decay_rules` and
        `rate_rules` (lists of (pattern, factor) on the weight decay and on the rate, first match
        wins), `ema_decay`.
      trainable: (abstract) trainable parameters, for their paths.
      held: frozen ones. Rules are the whole run's: they may name what this phase freezes.

    Raises:
      UserError: a rule matches nothing or a parameter is not covered.
    """
    paths = [*flatten(trainable), *flatten(held or {})]
    decay = assign(paths, config.decay_rules, "config.optimizer.decay_rules")
    rate = assign(paths, config.rate_rules, "config.optimizer.rate_rules")
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    return optax.chain(
        *clip,
        standard_promotion(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)),
        per_parameter(decay, lambda u, p, factor: u + (config.weight_decay * factor) * p),
        per_parameter(rate, lambda u, p, factor: u * factor),
        scale_by_rate(),
        ema_teacher(config.ema_decay, TEACHER_PREFIX),
    )
