"""One jitted, donated, sharded train step per phase."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from ovseg_jax import sharding
from ovseg_jax.models.ovsegmentor import OVSegmentor
from ovseg_jax.optim import groups
from ovseg_jax.sharding import AnyMesh
from ovseg_jax.train import accumulate
from ovseg_jax.train.erasing import erased_batch
from ovseg_jax.train.state import TrainState, teacher_of
from ovseg_jax.train.terms import example_rows, joint_loss, loss_terms

RNG_NAMES = ("gumbel", "dropout")
ERASING = len(RNG_NAMES)  # number of the stream that no part of the model draws from


def step_rngs(seed: int, step: Any) -> dict[str, jax.Array]:
    """Random keys of a step: a function of the seed, the stream's name and the step alone."""
    return {name: _step_key(seed, index, step) for index, name in enumerate(RNG_NAMES)}


def _step_key(seed: int, stream: int, step: Any) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), step)


def train_step(
    state: TrainState,
    batch: Mapping[str, jax.Array],
    *,
    model: OVSegmentor,
    tx: optax.GradientTransformationExtraArgs,
    rate: Callable[[jax.Array], jax.Array],
    config: ConfigDict,
    mask_weight: float,
    frozen: tuple[str, ...],
    mesh: AnyMesh | None,
    erase: Mapping[str, Any] | None = None,
    noise: Mapping[str, Any] | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Gradient, update, teacher, metrics.

    A non-finite loss or gradient leaves parameters, moments, teacher and running statistics as they
    were and is counted in `state.skipped`; the step number goes on, so that the next batch is
    another one.

    Args:
      rate: learning rate as a function of the step. config: the whole run's.
      mask_weight, frozen: the phase's lambda and frozen patterns.
      erase: random erasing of the images, see `erasing.erased_batch`; None for none.
      noise: see `loss_terms`; not with accumulation.
    """
    trainable, held = groups.split(state.params, frozen)
    teacher = teacher_of(state, frozen) if mask_weight > 0 else None
    text_dropout = "text_encoder" in trainable or config.loss.frozen_text_dropout
    rngs = step_rngs(config.seed, state.step)
    if erase is not None:
        batch = erased_batch(batch, erase, _step_key(config.seed, ERASING, state.step))

    with sharding.activations_on(mesh):
        loss, metrics, batch_stats, grads = _gradient(
            model,
            trainable,
            held,
            teacher,
            batch,
            config,
            rngs,
            state.batch_stats,
            {"mask_weight": mask_weight, "mesh": mesh},
            {"text_dropout": text_dropout, "noise": noise},
        )
    learning_rate = rate(state.step)
    updates, opt_state = tx.update(grads, state.opt_state, trainable, rate=learning_rate)
    # One number is not finite where any gradient is not (or where their squares overflow). Testing
    # each leaf instead doubles compile time: XLA repeats the conjunction of all the tests in the
    # update of every parameter.
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    changed = (optax.apply_updates(trainable, updates), opt_state, batch_stats)
    kept_params, kept_opt, kept_stats = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        changed,
        (trainable, state.opt_state, state.batch_stats),
    )
    skipped = jnp.where(finite, 0, state.skipped + 1)
    metrics |= {
        "grad_norm": norm,
        "learning_rate": learning_rate,
        "skipped": skipped,
    }
    params = groups.join(held, kept_params)
    new = TrainState(state.step + 1, skipped, params, kept_opt, kept_stats)
    return new, metrics


def _gradient(
    model: OVSegmentor,
    trainable: Any,
    held: Any,
    teacher: Any,
    batch: Mapping[str, jax.Array],
    config: ConfigDict,
    rngs: Mapping[str, jax.Array],
    statistics: Any,
    shared: Mapping[str, Any],
    options: Mapping[str, Any],
) -> tuple[jax.Array, dict[str, jax.Array], Any, Any]:
    """Loss, metrics, running statistics and gradient, in as many passes as the config says.

    Args:
      shared: keywords of both halves of the loss. options: further ones of `example_rows`.
    """
    count, mesh = config.accumulation.micro_batches, shared["mesh"]

    def loss_of(
        trainable: Any, part: Any, rngs: Any, statistics: Any, loss: ConfigDict
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Any]]:
        params = groups.join(held, trainable)
        keywords = {**shared, **options, "rngs": rngs, "statistics": statistics}
        return loss_terms(model, params, teacher, part, loss, **keywords)

    if count == 1:
        differentiate = jax.value_and_grad(loss_of, has_aux=True)
        (loss, (metrics, after)), grads = differentiate(
            trainable, batch, rngs, statistics, config.loss
        )
        return loss, metrics, after, grads
    if config.accumulation.contrast == "micro_batch":
        part_loss = accumulate.part_config(config.loss, count)

        def numbered_loss(trainable: Any, part: Any, number: Any, statistics: Any) -> Any:
            keys = accumulate.numbered(rngs, number)
            return loss_of(trainable, part, keys, statistics, part_loss)

        return accumulate.micro_batch_gradient(
            numbered_loss, trainable, batch, statistics, count, mesh
        )

    def rows_of(trainable: Any, part: Any, number: Any) -> Any:
        params = groups.join(held, trainable)
        keywords = {**shared, **options, "rngs": accumulate.numbered(rngs, number)}
        return example_rows(model, params, teacher, part, config.loss, **keywords)[0]

    def joint(trainable: Any, rows: Any, batch: Any) -> Any:
        return joint_loss(model, groups.join(held, trainable), rows, batch, config.loss, **shared)

    loss, metrics, grads = accumulate.exact_gradient(rows_of, joint, trainable, batch, count, mesh)
    return loss, metrics, statistics, grads


def compile_step(
    step: Callable[..., Any], shardings: TrainState, mesh: AnyMesh
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Jits `step(state, batch)`: state donated and kept in place, batch split, metrics whole."""
    whole = sharding.replicated(mesh)
    return jax.jit(
        step,
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, whole),
        donate_argnums=0,
    )
