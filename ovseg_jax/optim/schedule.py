"""Learning rate as a function of the step."""

import jax.numpy as jnp
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.shapes import Array, Float, Int

COSINE_FROM = ("warmup_end", "first_step")


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
      step: steps already taken. peak, end: learning rates. warmup, total: steps.
      start: rate of step 0 where there is a warm-up; None starts at peak / warmup, so that step
        `warmup - 1` has the peak.
      cosine_from: where the cosine begins. With "first_step" the warm-up hides its beginning, and
        the rate drops a little below the peak where the warm-up ends (the released training).

    Raises:
      UserError: `cosine_from` has none of its values.
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
      step: global step.
      config: `peak`, `warmup` (steps if >= 1, else a share of the schedule), `end`, `start` and
        `cosine_from` (see `warmup_cosine`), and `delay`: step n has the rate of n - delay, the
        first `delay` steps that of 0. (1 in the released training, which sets the rate after the
        update.)
      first: global step at which the schedule starts; total: its length in steps. Step counts, not
        the optimizer's own counter, so that a skipped (non-finite) step cannot shift it.
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
