"""The learning rate, and AdamW with clipping, parameter groups and the EMA teacher in one chain."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.optim.ema_teacher import ema_teacher
from ovseg_jax.optim.groups import assign, flatten, nest
from ovseg_jax.shapes import Array, Float, Int

COSINE_FROM = ("warmup_end", "first_step")
TEACHER_PREFIX = "image_encoder/"


def warmup_cosine(
    step: Int[Array, ""],
    *,
    peak: float,
    warmup: int,
    total: int,
    end: float,
    start: float | None = None,
    cosine_from: str = "warmup_end",
) -> Float[Array, ""]:
    """Linear warm-up to `peak`, then half a cosine down to `end` at `total`.

    Args:
      step: steps already taken.
      warmup, total: steps.
      start: rate of step 0 where there is a warm-up; None starts at peak / warmup, so that step
        `warmup - 1` has the peak.
      cosine_from: where the cosine begins. With "first_step" the warm-up hides its beginning, and
        the rate drops a little below the peak where the warm-up ends (the released training).
    """
    if cosine_from not in COSINE_FROM:
        raise UserError(
            f"config.optimizer.learning_rate.cosine_from is {cosine_from!r}; it must be one of "
            + ", ".join(map(repr, COSINE_FROM))
        )
    step = step.astype(jnp.float32)
    if start is None:
        rising = jnp.minimum(peak * (step + 1.0) / max(warmup, 1), peak)
    else:
        rising = start + step * ((peak - start) / max(warmup, 1))
    first = warmup if cosine_from == "warmup_end" else 0
    progress = jnp.clip((step - first) / max(total - first, 1), 0.0, 1.0)
    falling = end + 0.5 * (peak - end) * (1.0 + jnp.cos(jnp.pi * progress))
    return jnp.where(step < warmup, rising, falling)


def learning_rate(
    step: Int[Array, ""], config: ConfigDict, *, first: int, total: int
) -> Float[Array, ""]:
    """The schedule that `config` describes, at a global step.

    Args:
      step: counts skipped (non-finite) steps too, unlike the optimizer's own counter.
      config: `warmup` in steps if >= 1, else as a share of the schedule; `delay`: step n has the
        rate of n - delay, and the first `delay` steps that of 0 (1 in the released training, which
        sets the rate after the update); the rest as in `warmup_cosine`.
      first: global step at which the schedule starts.
      total: its length in steps.
    """
    warmup = config.warmup if config.warmup >= 1 else config.warmup * total
    return warmup_cosine(
        jnp.maximum(step - first - config.delay, 0),
        peak=config.peak,
        warmup=int(warmup),
        total=total,
        end=config.end,
        start=config.start,
        cosine_from=config.cosine_from,
    )


def per_parameter(
    values: Mapping[str, Any], combine: Callable[[Array, Array, Any], Array]
) -> optax.GradientTransformation:
    """Stateless transformation ``u <- combine(u, p, value of the parameter)``."""

    def update(updates: Any, params: Any) -> Any:
        weights = flatten(params)
        return nest({k: combine(u, weights[k], values[k]) for k, u in flatten(updates).items()})

    return optax.stateless(update)


def scale_by_rate() -> optax.GradientTransformationExtraArgs:
    """Scales by minus the learning rate given at each update (``rate=...``)."""

    def update(updates: Any, state: Any, params: Any = None, *, rate: Array, **_: Any) -> tuple:
        return jax.tree.map(lambda u: -rate.astype(u.dtype) * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def standard_promotion(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` under JAX's standard dtype promotion: optax's bias correction mixes int32 and float."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple:
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(updates, state, params)

    return optax.GradientTransformation(tx.init, update)


def make_optimizer(
    config: ConfigDict, trainable: Mapping[str, Any], held: Mapping[str, Any] | None = None
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of the trainable (abstract) parameters.

    Order: clip by global norm, Adam, decoupled weight decay, learning rate, EMA teacher. The rate
    is an argument of ``update`` (``rate=...``), so that it follows the run's step.

    Args:
      config: `b1`, `b2`, `eps`, `clip_norm` (0 for none), `weight_decay`, `decay_rules` and
        `rate_rules` (lists of (pattern, factor), first match wins), `ema_decay`.
      held: frozen parameters. Rules are the whole run's: they may name what this phase freezes.

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
