"""The gradient of one batch in several passes, where its activations do not fit the memory at once.

The contrastive losses compare each example with the whole batch, so summing the gradients of
micro-batches would change them. Here the embeddings of all micro-batches are made first (Gao et
al., 2021, "Scaling deep contrastive learning batch size under memory limited setup").
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ovseg_jax.shapes import Array, Float
from ovseg_jax.sharding import BATCH_AXES, AnyMesh
from ovseg_jax.train.apply import Batch, Params

# What examples contribute to the loss: any tree of floats whose first axis is that of the examples.
Outputs = Any
# (trainable parameters, micro-batch, its number) -> outputs
OutputsOf = Callable[[Params, Batch, Array], Outputs]
# (trainable parameters, outputs, batch) -> (loss, metrics)
JointLoss = Callable[[Params, Outputs, Batch], tuple[Array, dict[str, Array]]]


def in_parts(batch: Any, count: int, mesh: AnyMesh | None) -> Any:
    """The batch with a new first axis of micro-batches: number m has the rows m, m + count, ....

    Every device has the same share of these rows: nothing moves between devices, and the
    micro-batches are the same on any number of them.
    """

    def apart(x: Array) -> Array:
        x = x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1)
        if mesh is None:
            return x
        place = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))
        return jax.lax.with_sharding_constraint(x, place)

    return jax.tree.map(apart, batch)


def in_one(parts: Any) -> Any:
    """Inverse of `in_parts`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)


def exact_gradient(
    outputs_of: OutputsOf,
    joint_loss: JointLoss,
    trainable: Params,
    batch: Batch,
    count: int,
    mesh: AnyMesh | None,
) -> tuple[Float[Array, ""], dict[str, Array], Params]:
    """Loss, metrics and gradient of the whole batch, with one micro-batch's activations in memory.

    The model runs forward over all micro-batches; the loss compares their outputs; then the model
    runs again over each micro-batch, with the same random draws, to carry the gradient of its
    outputs back.

    Args:
      outputs_of: runs the model; its draws depend only on the micro-batch's number.
      joint_loss: compares the outputs of all examples.
      count: of micro-batches.
    """
    parts, numbers = in_parts(dict(batch), count, mesh), jnp.arange(count)

    def forward(_: None, part: tuple[Batch, Array]) -> tuple[None, Outputs]:
        return None, outputs_of(trainable, *part)

    _, outputs = jax.lax.scan(forward, None, (parts, numbers))
    differentiate = jax.value_and_grad(joint_loss, (0, 1), has_aux=True)
    (loss, metrics), (direct, towards_outputs) = differentiate(trainable, in_one(outputs), batch)

    def backward(sums: Params, part: tuple[Batch, Array, Outputs]) -> tuple[Params, None]:
        micro_batch, number, towards = part
        _, pull = jax.vjp(lambda p: outputs_of(p, micro_batch, number), trainable)
        return jax.tree.map(jnp.add, sums, pull(towards)[0]), None

    towards_parts = in_parts(towards_outputs, count, mesh)
    gradient, _ = jax.lax.scan(backward, direct, (parts, numbers, towards_parts))
    return loss, metrics, gradient
