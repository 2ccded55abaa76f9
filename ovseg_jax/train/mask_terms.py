"""The mask term of a step: which model sees which image, and which form compares them."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from ml_collections import ConfigDict

from ovseg_jax import sharding
from ovseg_jax.errors import UserError
from ovseg_jax.losses import mask_consistency as consistency
from ovseg_jax.losses.contrastive import group_set_nce, negatives_mask
from ovseg_jax.losses.objective import divided_sum, weighted_mean
from ovseg_jax.losses.released_mask_consistency import group_mask_loss
from ovseg_jax.models.ovsegmentor import OVSegmentor, unit
from ovseg_jax.models.vit import VisualTokens
from ovseg_jax.shapes import Array, Float
from ovseg_jax.sharding import AnyMesh
from ovseg_jax.train import apply
from ovseg_jax.train.apply import Batch, Params, merge, unmerge, within_set

# The images of a pair.
FIRST, SECOND = 0, 1


@struct.dataclass
class View:
    """One image of each pair, seen by one model: tokens, and groups in the joint space.

    The groups are not normalized.
    """

    tokens: VisualTokens
    embedded: Float[Array, "B K E"]


@struct.dataclass
class PairOutputs:
    """What each pair contributes: by masks, or by groups (unit norm) in n directions."""

    loss: Float[Array, "*parts B"] | None = None
    target_fraction: Float[Array, "*parts B"] | None = None
    groups: Float[Array, "*parts B n S E"] | None = None
    partner_groups: Float[Array, "*parts B n S E"] | None = None


def online_images(config: ConfigDict) -> tuple[int, ...]:
    """Which images of a pair the online model must see."""
    return (FIRST,) if config.mask_directions == "one" else (FIRST, SECOND)


def view(
    model: OVSegmentor, params: Params, statistics: Params, tokens: VisualTokens
) -> tuple[Float[Array, "B E"], View, Params]:
    """The image embedding (of the mean group, not normalized), the `View`, and the statistics."""
    mean = jnp.mean(tokens.groups, axis=1)
    pooled, statistics = apply.apply(model, params, statistics, "embed_image", mean, True)
    groups, statistics = apply.apply(model, params, statistics, "embed_image", tokens.groups, True)
    return pooled, View(tokens, groups), statistics


def teacher_views(
    model: OVSegmentor,
    params: Params,
    statistics: Params,
    teacher: Params,
    images: Sequence[Array],
    config: ConfigDict,
    *,
    rngs: Mapping[str, Array],
    noise: Mapping[str, Any] | None,
    mesh: AnyMesh | None,
) -> tuple[dict[int, View], Params]:
    """The teacher's views of a pair, and the statistics after them. No gradient flows back.

    Args:
      params: the online model's; its projector serves the teacher (a visual encoder) too.
      images: both images of the pair. noise: see `per_example_outputs`.
    """
    seen = (SECOND,) if config.mask_directions == "one" else (SECOND, FIRST)
    params = jax.lax.stop_gradient({**params, "image_encoder": teacher})
    # Its own draws: the online pass has the same shapes, and would draw the same.
    rngs = {name: jax.random.fold_in(key, 1) for name, key in rngs.items()}
    given = merge(*(noise["teacher"][i] for i in seen)) if noise is not None else None
    merged = merge(*(images[i] for i in seen))
    tokens = model.apply(
        {"params": params}, merged, config.teacher_noise, given, method="visual_tokens", rngs=rngs
    )
    views = {}
    for i, part in zip(seen, sharding.keep_split(unmerge(tokens, len(seen)), mesh), strict=True):
        _, seen_by_teacher, statistics = view(model, params, statistics, part)
        views[i] = jax.lax.stop_gradient(seen_by_teacher)
    return views, statistics


def pair_outputs(
    online: Mapping[int, View],
    teacher: Mapping[int, View],
    entity: Float[Array, "B E"],
    config: ConfigDict,
    *,
    grid: tuple[int, int],
    mesh: AnyMesh | None,
) -> PairOutputs:
    """What each pair contributes to the mask term, by the run's ``config.loss``.

    `cross_image`: "masks", or "groups" (Table 6, `contrastive.group_set_nce`), for which only
    `group_ratio` and `mask_directions` count. `mask_maps`: "final_tokens" (the paper's,
    `mask_consistency`) or "binding" (the released model's, `released_mask_consistency`).

    Args:
      online, teacher: views by the number of the image in its pair.
      entity: sentences that name the shared entity in the joint space, not normalized; no gradient
        flows into them.
      grid: (rows, columns) of an image's patches.
    """
    entity = jax.lax.stop_gradient(entity)
    # A direction goes from an image by the online model to its partner by the teacher.
    directions = [(online[i], teacher[1 - i]) for i in online_images(config)]
    if config.cross_image == "groups":
        groups, partners = (
            jnp.stack([_nearest_groups(image, entity, config) for image in side], axis=1)
            for side in zip(*directions, strict=True)
        )
        return PairOutputs(groups=groups, partner_groups=partners)
    options = {"threshold": config.mask_threshold, "backend": config.matching, "mesh": mesh}
    if config.mask_maps == "final_tokens":
        per_pair, extra = consistency.consistency_loss(
            (_regions(online[FIRST]), _regions(online[SECOND])),
            (_regions(teacher[FIRST]), _regions(teacher[SECOND])),
            unit(entity),
            ratio=config.group_ratio,
            **options,
        )
        return PairOutputs(per_pair, extra["target_fraction"])
    scores = [
        jnp.einsum("bke,be->bk", jax.lax.stop_gradient(image.embedded), entity)
        for image, _ in directions
    ]
    values, extra = group_mask_loss(
        merge(*(image.tokens.query for image, _ in directions)),
        merge(*(partner.tokens.query for _, partner in directions)),
        merge(*(partner.tokens.key for _, partner in directions)),
        merge(*scores),
        grid=grid,
        size=(config.mask_size, config.mask_size),
        detached_ratio=config.detached_ratio,
        cost=config.mask_cost,
        **options,
    )
    loss, fraction = (
        jnp.mean(x.reshape(-1, len(directions)), axis=1) for x in (values, extra["target_fraction"])
    )
    return PairOutputs(loss, fraction)


def _nearest_groups(
    image: View, entity: Float[Array, "B E"], config: ConfigDict
) -> Float[Array, "B S E"]:
    """The groups, unit norm, that are nearest to the entity."""
    joint = unit(image.embedded)
    count = consistency.subgroup_count(joint.shape[1], config.group_ratio)
    indices = consistency.select_groups(joint, unit(entity), count)
    return jnp.take_along_axis(joint, indices[..., None], axis=1)


def _regions(image: View) -> consistency.Regions:
    if image.tokens.patches is None:
        raise UserError(
            "config.loss.mask_maps = 'final_tokens' needs final patch tokens, which "
            "config.model.image.second_stage = 'groups' does not give: use mask_maps = 'binding'"
        )
    return consistency.Regions(image.tokens.patches, image.tokens.groups, unit(image.embedded))


def mask_term(
    outputs: PairOutputs, scale: Float[Array, ""], batch: Batch, config: ConfigDict
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The loss of a batch of pairs and its metrics, from what `pair_outputs` gave.

    A mean over pairs, or with ``config.mask_divisor`` their sum divided by it.
    """
    weight = batch["weight"] * batch["pair_weight"]
    if config.cross_image == "groups":
        negatives = negatives_mask(weight, within=within_set(batch, config))
        values = [
            group_set_nce(outputs.groups[:, i], outputs.partner_groups[:, i], scale, negatives)
            for i in range(outputs.groups.shape[1])
        ]
        loss = weighted_mean(jnp.mean(jnp.stack(values), axis=0), weight)
        return loss, {"mask": loss}
    if config.mask_divisor:
        loss = divided_sum(outputs.loss, weight, config.mask_divisor)
    else:
        loss = weighted_mean(outputs.loss, weight)
    fraction = weighted_mean(outputs.target_fraction, weight)
    return loss, {"mask": loss, "mask_target_fraction": fraction}
