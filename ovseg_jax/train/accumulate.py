"""Gradients of one batch in several passes, where it does not fit the memory at once.

Contrast compares each example with the whole batch, so adding up the gradients of parts changes the
loss, unless the embeddings of all parts are made first (Gao et al., 2021, "Scaling deep contrastive
learning batch size under memory limited setup"). Both are here; the config says which.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.shapes import Array, Float
from ovseg_jax.sharding import BATCH_AXES, AnyMesh, batch_shards
from ovseg_jax.train.batches import Batch, Rows
from ovseg_jax.train.calls import Params
from ovseg_jax.train.phases import Phase

CONTRASTS = ("batch", "micro_batch")

# (trainable parameters, part of a batch, its number) -> rows
RowsOf = Callable[[Params, Batch, Array], Rows]
# (trainable parameters, rows, batch) -> (loss, metrics)
JointLoss = Callable[[Params, Rows, Batch], tuple[Array, dict[str, Array]]]
# (trainable parameters, part of a batch, its number, statistics)
# -> (loss, (metrics, statistics))
PartLoss = Callable[..., tuple[Array, tuple[dict[str, Array], Params]]]


def check_accumulation(config: ConfigDict, phases: Sequence[Phase], mesh: Any) -> None:
    """Refuses a ``config.accumulation`` that cannot be computed.

    Its fields: `micro_batches`, the passes that a batch is worked on in; `contrast`, what each
    example is compared with: the whole "batch" (exact; each pass runs the model forward twice), or
    its "micro_batch" (fewer negatives, another loss).

    Raises:
      UserError: a field has none of its values, the passes do not divide a batch, or batch norms
        stand in the way.
    """
    spec = config.accumulation
    if spec.contrast not in CONTRASTS:
        listed = ", ".join(map(repr, CONTRASTS))
        raise UserError(
            f"config.accumulation.contrast is {spec.contrast!r}; it must be one of {listed}"
        )
    if spec.micro_batches < 1:
        raise UserError("config.accumulation.micro_batches must be at least 1")
    if spec.micro_batches == 1:
        return
    if spec.contrast == "batch" and config.model.projector_norm == "batch":
        raise UserError(
            "config.accumulation.contrast = 'batch' cannot be exact with batch norms "
            "(config.model.projector_norm = 'batch'), which see one micro-batch at a time: set it "
            "to 'micro_batch', or micro_batches = 1"
        )
    for phase in phases:
        parts = spec.micro_batches * batch_shards(mesh)
        if phase.batch_size % parts:
            raise UserError(
                f"config.phases[{phase.index}].batch_size = {phase.batch_size} does not divide "
                f"into {spec.micro_batches} micro-batches on {batch_shards(mesh)} batch shards"
            )


def in_parts(batch: Batch, count: int, mesh: AnyMesh | None) -> Batch:
    """The batch with a new first axis of micro-batches: number m has the rows m, m + count, ....

    Such rows lie on every device alike: nothing moves between devices, and the parts are the same
    on any number of them.
    """

    def apart(x: Array) -> Array:
        x = x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
        if mesh is None:
            return x
        place = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))
        return jax.lax.with_sharding_constraint(x, place)

    return jax.tree.map(apart, dict(batch))


def in_one(parts: Rows) -> Rows:
    """Inverse of `in_parts`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)


def exact_gradient(
    rows_of: RowsOf,
    joint_loss: JointLoss,
    trainable: Params,
    batch: Batch,
    count: int,
    mesh: AnyMesh | None,
) -> tuple[Float[Array, ""], dict[str, Array], Params]:
    """Loss, metrics and gradient of the whole batch, with one micro-batch's activations in memory.

    The model runs forward over all micro-batches; the loss is taken of their rows together; then it
    runs again over each, with the same random draws, to carry the gradient of its rows back.

    Args:
      rows_of: runs the model; its draws depend on the micro-batch's number alone.
      joint_loss: compares the rows of all examples.
      count: of micro-batches.
    """
    parts, numbers = in_parts(batch, count, mesh), jnp.arange(count)

    def forward(_: None, part: tuple[Batch, Array]) -> tuple[None, Rows]:
        return None, rows_of(trainable, *part)

    _, rows = jax.lax.scan(forward, None, (parts, numbers))
    differentiate = jax.value_and_grad(joint_loss, (0, 1), has_aux=True)
    (loss, metrics), (direct, towards_rows) = differentiate(trainable, in_one(rows), batch)

    def backward(sums: Params, part: tuple[Batch, Array, Rows]) -> tuple[Params, None]:
        one, number, towards = part
        _, pull = jax.vjp(lambda p: rows_of(p, one, number), trainable)
        return jax.tree.map(jnp.add, sums, pull(towards)[0]), None

    towards_parts = in_parts(towards_rows, count, mesh)
    gradient, _ = jax.lax.scan(backward, direct, (parts, numbers, towards_parts))
    return loss, metrics, gradient


def micro_batch_gradient(
    loss_of: PartLoss,
    trainable: Params,
    batch: Batch,
    statistics: Params,
    count: int,
    mesh: AnyMesh | None,
) -> tuple[Float[Array, ""], dict[str, Array], Params, Params]:
    """Mean loss, metrics and gradient of micro-batches that are contrasted each within itself.

    Returns:
      Loss, metrics, running statistics (moved by one micro-batch after the other) and gradient.
    """

    def work(
        carry: tuple[Params, Params], part: tuple[Batch, Array]
    ) -> tuple[tuple[Params, Params], tuple[Array, dict[str, Array]]]:
        sums, before = carry
        (loss, (metrics, after)), gradient = jax.value_and_grad(loss_of, has_aux=True)(
            trainable, *part, before
        )
        return (jax.tree.map(jnp.add, sums, gradient), after), (loss, metrics)

    start = jax.tree.map(jnp.zeros_like, trainable), statistics
    parts = (in_parts(batch, count, mesh), jnp.arange(count))
    (sums, statistics), (losses, metrics) = jax.lax.scan(work, start, parts)
    metrics = {name: jnp.mean(values) for name, values in metrics.items()}
    return jnp.mean(losses), metrics, statistics, jax.tree.map(lambda x: x / count, sums)


def part_config(config: ConfigDict, count: int) -> ConfigDict:
    """The ``config.loss`` of a micro-batch: a divisor of the mask term's sum is its share."""
    part = config.copy_and_resolve_references()
    part.mask_divisor = config.mask_divisor / count
    return part


def numbered(rngs: Mapping[str, Array], number: Array) -> dict[str, Array]:
    """Random keys of a micro-batch."""
    return {name: jax.random.fold_in(key, number) for name, key in rngs.items()}
