"""Learning rate as a function of the step."""

import jax.numpy as jnp
from ml_collections import ConfigDict

from ovseg_jax.shapes import Array, Float, Int


def warmup_cosine(
    step: Int[Array, ""], *, peak: float, warmup: int, total: int, end: float
) -> Float[Array, ""]:
    """Linear warm-up from 0 to `peak`, then a half cosine down to `end` at `total`.

    Args:
      step: steps already taken. peak, end: learning rates. warmup, total: steps.
    """
    step = step.astype(jnp.float32)
    rising = peak * (step + 1.0) / max(warmup, 1)
    progress = jnp.clip((step - warmup) / max(total - warmup, 1), 0.0, 1.0)
    falling = end + 0.5 * (peak - end) * (1.0 + jnp.cos(jnp.pi * progress))
    return jnp.where(step < warmup, jnp.minimum(rising, peak), falling)


def learning_rate(
    step: Int[Array, ""], config: ConfigDict, *, first: int, total: int
) -> Float[Array, ""]:
    """The schedule that `config` describes, at a global step.

    Args:
      step: global step.
      config: `peak`, `warmup` (steps if >= 1, else a share of the schedule) and `end`.
      first: global step at which the schedule starts; total: its length in steps. Step counts, not
        the optimizer's own counter, so that a skipped (non-finite) step cannot shift it.
    """
    warmup = config.warmup if config.warmup >= 1 else config.warmup * total
    return warmup_cosine(
        step - first, peak=config.peak, warmup=int(warmup), total=total, end=config.end
    )
