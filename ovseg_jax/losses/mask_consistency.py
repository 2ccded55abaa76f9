"""Cross-image mask consistency (Eq. 10-12).

Two images share an entity e. The groups that stand for e in either should cut the same regions out
of one image: the teacher's own groups draw the target, the online groups of the *other* image draw
the prediction, matched one to one.
"""

import jax
import jax.numpy as jnp
from flax import struct

from ovseg_jax.errors import UserError
from ovseg_jax.losses.matching import match
from ovseg_jax.shapes import Array, Float, Int
from ovseg_jax.sharding import AnyMesh

# Products that thresholds, matchings and selections are decided on: three digits of a fast matmul
# would move them.
EXACT = jax.lax.Precision.HIGHEST


@struct.dataclass
class Regions:
    """One image seen by one model: final image tokens I and group tokens G, and the groups in the
    joint space at unit norm, which only select subgroups."""

    patches: Float[Array, "B L D"]
    groups: Float[Array, "B K D"]
    joint: Float[Array, "B K E"]


def subgroup_count(groups: int, ratio: float) -> int:
    """K' = rK (Sec. 3.2): how many groups of an image stand for the shared entity.

    Raises:
      UserError: the ratio keeps no group, or more than there are.
    """
    kept = int(groups * ratio + 1e-6)  # 0.1 * 30 must give 3
    if not 1 <= kept <= groups:
        raise UserError(f"config.loss.group_ratio = {ratio} keeps {kept} of {groups} groups")
    return kept


def select_groups(
    joint: Float[Array, "B K E"], entity: Float[Array, "B E"], count: int
) -> Int[Array, "B S"]:
    """Indices of the `count` groups most similar to the entity (both unit norm), best first."""
    cosine = jnp.einsum("bke,be->bk", joint, entity, precision=EXACT)
    # Not `top_k`, for which the partitioner gathers all rows on every device.
    return jnp.argsort(-jax.lax.stop_gradient(cosine), axis=-1)[:, :count]


def mask_logits(
    patches: Float[Array, "B L D"], groups: Float[Array, "B S D"]
) -> Float[Array, "B S L"]:
    """Eq. 10 before the sigmoid: I G^T D^-0.5, one map per group, float32.

    Unscaled, the sigmoid of two layer-normalized tokens saturates and passes no gradient.
    """
    scale = patches.shape[-1] ** -0.5
    patches, groups = patches.astype(jnp.float32) * scale, groups.astype(jnp.float32)
    return jnp.einsum("bld,bsd->bsl", patches, groups, precision=EXACT)


def matching_cost(
    target: Float[Array, "B S L"], prediction: Float[Array, "B S L"]
) -> Float[Array, "B S S"]:
    """Eq. 11's cost: minus the cosine between target k and prediction j, at [b, k, j]."""

    def unit(masks: Array) -> Array:
        norm = jnp.sqrt(jnp.sum(masks * masks, axis=-1, keepdims=True))
        return masks / jnp.maximum(norm, 1e-12)

    return -jnp.einsum("bkl,bjl->bkj", unit(target), unit(prediction), precision=EXACT)


def dice(target: Float[Array, "B S L"], prediction: Float[Array, "B S L"]) -> Float[Array, "B S"]:
    """Dice loss (Eq. 12), ``1 - 2 |m ^ p| / (|m| + |p|)``, of targets 0 or 1 and a soft prediction.

    An empty target gives 1 with no gradient, both empty 0.
    """
    size = jnp.sum(target, axis=-1) + jnp.sum(prediction, axis=-1)
    safe = jnp.where(size > 0, size, 1.0)
    overlap = jnp.sum(target * prediction, axis=-1)
    return jnp.where(size > 0, 1.0 - 2.0 * overlap / safe, 0.0)


def consistency_loss(
    online: tuple[Regions, Regions],
    teacher: tuple[Regions, Regions],
    entity: Float[Array, "B E"],
    *,
    ratio: float,
    threshold: float,
    backend: str = "host",
    mesh: AnyMesh | None = None,
) -> tuple[Float[Array, "B"], dict[str, Array]]:
    """Eq. 12, one value per pair of images, both directions.

    Args:
      online, teacher: images 1 and 2, by the online model and by the EMA teacher (no gradient).
      entity: 'a photo of e' of the shared entity in the joint space, unit norm.
      ratio: r, the share of groups kept. threshold: delta, that makes the target binary.
      backend, mesh: see `matching.match`.

    Returns:
      The losses, and "target_fraction" [B]: the share of patches that targets cover.
    """
    teacher = jax.lax.stop_gradient(teacher)
    count = subgroup_count(online[0].groups.shape[1], ratio)

    def subgroups(regions: Regions) -> Array:
        chosen = select_groups(regions.joint, entity, count)
        return jnp.take_along_axis(regions.groups, chosen[..., None], axis=1)

    # Both directions in one stack, so that the host is called once per step: image 1 drawn by the
    # groups of image 2, then image 2 by those of image 1. A pair's two problems stay neighbors:
    # with the batch split over devices, matching them needs no communication.
    def both(first: Array, second: Array) -> Array:
        stacked = jnp.stack([first, second], axis=1)
        return jax.nn.sigmoid(stacked.reshape(-1, *first.shape[1:]))

    soft = both(*(mask_logits(image.patches, subgroups(image)) for image in teacher))
    predicted = both(
        mask_logits(online[0].patches, subgroups(online[1])),
        mask_logits(online[1].patches, subgroups(online[0])),
    )
    permutation = match(matching_cost(soft, predicted), backend, mesh)
    matched = jnp.take_along_axis(predicted, permutation[..., None], axis=1)
    target = (soft > threshold).astype(jnp.float32)
    losses = jnp.sum(dice(target, matched), axis=-1).reshape(-1, 2)
    fraction = jnp.mean(target, axis=(1, 2)).reshape(-1, 2)
    return jnp.mean(losses, axis=1), {"target_fraction": jnp.mean(fraction, axis=1)}
