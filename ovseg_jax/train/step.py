"""The train state and the train step: gradient, guard, update, teacher, metrics."""

import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from ovseg_jax import sharding
from ovseg_jax.models.build import init_params, init_statistics
from ovseg_jax.models.ovsegmentor import OVSegmentor
from ovseg_jax.optim import groups
from ovseg_jax.optim.ema_teacher import teacher_of
from ovseg_jax.optim.optimizer import make_optimizer
from ovseg_jax.shapes import Array, Float
from ovseg_jax.sharding import AnyMesh
from ovseg_jax.train.apply import Batch, Params, erased_batch
from ovseg_jax.train.loss import Outputs, joint_loss, per_example_outputs
from ovseg_jax.train.phases import Phase, rate_at

RNG_NAMES = ("gumbel", "dropout")
ERASING = len(RNG_NAMES)  # number of the stream for erasing, which the model does not draw from

Metrics = dict[str, jax.Array]


@struct.dataclass
class TrainState:
    """One training run at one step; or shapes or shardings in place of its arrays."""

    step: Any  # steps taken, int32, skipped ones included; also the position in the data
    skipped: Any  # steps in a row, int32, whose loss or gradient was not finite
    params: dict[str, Any]  # frozen ones too
    opt_state: Any  # moments and EMA teacher of the trainable parameters
    batch_stats: Any  # running statistics of batch norms; {} where the model has none


def new_state(
    params: Params,
    tx: optax.GradientTransformation,
    frozen: tuple[str, ...],
    batch_stats: Params | None = None,
) -> TrainState:
    """A state at step 0. To be called under jit, so that no buffer is shared."""
    trainable, _ = groups.split(params, frozen)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, zero, dict(params), tx.init(trainable), dict(batch_stats or {}))


def step_rngs(seed: int, step: Any) -> dict[str, jax.Array]:
    """Random keys of a step: a function of the seed, the stream's name and the step alone."""
    return {name: _step_key(seed, index, step) for index, name in enumerate(RNG_NAMES)}


def _step_key(seed: int, stream: int, step: Any) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stream), step)


def train_step(
    state: TrainState,
    batch: Batch,
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
) -> tuple[TrainState, Metrics]:
    """One step of training, and its metrics (scalars).

    A non-finite loss or gradient changes nothing but the step number, so that the next batch is
    another one, and `state.skipped`, the count.

    Args:
      rate: the learning rate as a function of the step.
      config: the whole run's.
      mask_weight, frozen: the phase's lambda and frozen patterns.
      erase: see `apply.erased_batch`.
      noise: see `per_example_outputs`; not with accumulation.
    """
    trainable, held = groups.split(state.params, frozen)
    rngs = step_rngs(config.seed, state.step)
    if erase is not None:
        batch = erased_batch(batch, erase, _step_key(config.seed, ERASING, state.step))
    forward = functools.partial(
        per_example_outputs,
        model,
        teacher=teacher_of(state, frozen) if mask_weight > 0 else None,
        config=config.loss,
        mask_weight=mask_weight,
        text_dropout="text_encoder" in trainable or config.loss.frozen_text_dropout,
        mesh=mesh,
        statistics=state.batch_stats,
        noise=noise,
    )

    def outputs_of_part(trainable: Params, part: Batch, number: jax.Array) -> Outputs:
        keys = {name: jax.random.fold_in(key, number) for name, key in rngs.items()}
        return forward(groups.join(held, trainable), batch=part, rngs=keys)[0]

    def loss_of_outputs(
        trainable: Params, outputs: Outputs, batch: Batch
    ) -> tuple[jax.Array, Metrics]:
        scale = model.apply({"params": groups.join(held, trainable)}, method="logit_scale")
        return joint_loss(scale, outputs, batch, config.loss, mask_weight=mask_weight)

    def loss_of_batch(trainable: Params) -> tuple[jax.Array, tuple[Metrics, Params]]:
        outputs, statistics = forward(groups.join(held, trainable), batch=batch, rngs=rngs)
        loss, metrics = loss_of_outputs(trainable, outputs, batch)
        return loss, (metrics, statistics)

    count = config.accumulation.micro_batches
    # The layers pin their activations to the mesh of the trace (`layers.rows_split`).
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if mesh is not None else nullcontext():
        if count == 1:
            differentiate = jax.value_and_grad(loss_of_batch, has_aux=True)
            (loss, (metrics, batch_stats)), grads = differentiate(trainable)
        else:
            batch_stats = state.batch_stats  # a model with batch norms is refused
            loss, metrics, grads = accumulated_gradient(
                outputs_of_part, loss_of_outputs, trainable, batch, count, mesh
            )

    # The norm is not finite where any gradient is not (or where their squares overflow). Testing
    # each leaf doubles compile time: XLA repeats all the tests in the update of every parameter.
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)

    # The teacher is part of the optimizer's state, and moves with it.
    learning_rate = rate(state.step)
    updates, opt_state = tx.update(grads, state.opt_state, trainable, rate=learning_rate)
    changed = (optax.apply_updates(trainable, updates), opt_state, batch_stats)
    trainable, opt_state, batch_stats = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        changed,
        (trainable, state.opt_state, state.batch_stats),
    )
    skipped = jnp.where(finite, 0, state.skipped + 1)
    metrics |= {"grad_norm": norm, "learning_rate": learning_rate, "skipped": skipped}
    params = groups.join(held, trainable)
    return TrainState(state.step + 1, skipped, params, opt_state, batch_stats), metrics


# ---- accumulation, where the activations of a batch do not fit the memory at once


def accumulated_gradient(
    outputs_of: Callable[[Params, Batch, Array], Any],
    joint_loss: Callable[[Params, Any, Batch], tuple[Array, Metrics]],
    trainable: Params,
    batch: Batch,
    count: int,
    mesh: AnyMesh | None,
) -> tuple[Float[Array, ""], Metrics, Params]:
    """Loss, metrics and gradient of the whole batch, with one micro-batch's activations in memory.

    The contrastive losses compare each example with the whole batch, so summing the gradients of
    micro-batches would change them. Instead the model runs forward over all micro-batches; the loss
    compares their outputs; then the model runs again over each micro-batch, with the same random
    draws, to carry the gradient of its outputs back (Gao et al., 2021, "Scaling deep contrastive
    learning batch size under memory limited setup").

    Args:
      outputs_of: (parameters, micro-batch, its number) to a tree of floats, examples first; its
        draws depend only on the number.
      joint_loss: (parameters, outputs of all examples, batch) to the loss and metrics.
    """
    parts, numbers = in_parts(dict(batch), count, mesh), jnp.arange(count)

    def forward(_: None, part: tuple[Batch, Array]) -> tuple[None, Any]:
        return None, outputs_of(trainable, *part)

    _, outputs = jax.lax.scan(forward, None, (parts, numbers))
    differentiate = jax.value_and_grad(joint_loss, (0, 1), has_aux=True)
    (loss, metrics), (direct, towards_outputs) = differentiate(trainable, in_one(outputs), batch)

    def backward(sums: Params, part: tuple[Batch, Array, Any]) -> tuple[Params, None]:
        micro_batch, number, towards = part
        _, pull = jax.vjp(lambda p: outputs_of(p, micro_batch, number), trainable)
        return jax.tree.map(jnp.add, sums, pull(towards)[0]), None

    towards_parts = in_parts(towards_outputs, count, mesh)
    gradient, _ = jax.lax.scan(backward, direct, (parts, numbers, towards_parts))
    return loss, metrics, gradient


def in_parts(batch: Any, count: int, mesh: AnyMesh | None) -> Any:
    """The batch with a new first axis of micro-batches: number m has the rows m, m + count, ....

    Every device has the same share of these rows, so that nothing moves between devices.
    """
    parts = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)
    if mesh is None:
        return parts
    rows = NamedSharding(mesh, PartitionSpec(None, sharding.BATCH_AXES))
    return jax.lax.with_sharding_constraint(parts, rows)


def in_one(parts: Any) -> Any:
    """Inverse of `in_parts`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)


# ---- the steps of a run


def compile_step(
    step: Callable[..., Any], shardings: TrainState, mesh: AnyMesh
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Jits `step(state, batch)`: state donated and kept in place, batch split, metrics whole."""
    return jax.jit(
        step,
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def abstract_state(
    model: OVSegmentor, tx: optax.GradientTransformation, frozen: tuple[str, ...], mesh: AnyMesh
) -> TrainState:
    """Shapes, dtypes and shardings of the state of a phase with this optimizer and frozen patterns.

    Moments and teacher lie where their parameters do.
    """

    def boxed(key: jax.Array) -> TrainState:
        return new_state(init_params(model, key), tx, frozen, init_statistics(model))

    return sharding.laid_out(jax.eval_shape(boxed, jax.random.key(0)), mesh)


@dataclass(kw_only=True)
class Program:
    """What is compiled in a run. Nothing in it needs data, weights or the devices of the mesh.

    Attributes:
      data: what decides the examples beside the config, see `resume.position_of`.
    """

    config: ConfigDict
    mesh: AnyMesh
    model: OVSegmentor
    phases: list[Phase] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    _states: dict[Any, TrainState] = field(default_factory=dict, init=False, repr=False)

    @property
    def total(self) -> int:
        """Steps of the whole run."""
        return self.phases[-1].last

    @functools.cached_property
    def abstract_params(self) -> dict[str, Any]:
        """Shapes, dtypes and shardings of all parameters."""
        boxed = jax.eval_shape(lambda key: init_params(self.model, key), jax.random.key(0))
        return sharding.laid_out(boxed, self.mesh)

    def optimizer(self, frozen: tuple[str, ...]) -> optax.GradientTransformationExtraArgs:
        """The optax chain of a phase with these frozen patterns."""
        return make_optimizer(self.config.optimizer, *groups.split(self.abstract_params, frozen))

    def abstract_state(self, frozen: tuple[str, ...]) -> TrainState:
        """`abstract_state` of a phase; made once, as tracing takes a second."""
        if frozen not in self._states:
            tx = self.optimizer(frozen)
            self._states[frozen] = abstract_state(self.model, tx, frozen, self.mesh)
        return self._states[frozen]

    def shardings(self, frozen: tuple[str, ...]) -> TrainState:
        """Where the arrays of a phase's state lie."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state(frozen))

    def step(self, phase: Phase) -> Callable[..., tuple[TrainState, Metrics]]:
        """The train step of a phase, not yet jitted: (state, batch) -> (state, metrics)."""
        return functools.partial(
            train_step,
            model=self.model,
            tx=self.optimizer(phase.frozen),
            rate=lambda s: rate_at(s, self.config, phase, self.total),
            config=self.config,
            mask_weight=phase.mask_weight,
            frozen=phase.frozen,
            mesh=self.mesh,
            erase=phase.erase,
        )

    def compiled_step(self, phase: Phase) -> Callable[..., tuple[TrainState, Metrics]]:
        """The jitted train step of a phase."""
        return compile_step(self.step(phase), self.shardings(phase.frozen), self.mesh)
