"""The mask term of a step: which image is seen by which model, and which form compares them."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from ml_collections import ConfigDict

from ovseg_jax import sharding
from ovseg_jax.errors import UserError
from ovseg_jax.losses.contrastive import group_set_nce, negatives_mask
from ovseg_jax.losses.mask_consistency import (
    Regions,
    consistency_loss,
    select_groups,
    subgroup_count,
)
from ovseg_jax.losses.matching import BACKENDS, ENUMERATE_LIMIT
from ovseg_jax.losses.objective import divided_sum, weighted_mean
from ovseg_jax.losses.released_mask_consistency import COSTS, group_mask_loss
from ovseg_jax.models.ovsegmentor import unit
from ovseg_jax.models.vit import VisualTokens
from ovseg_jax.shapes import Array, Float
from ovseg_jax.sharding import AnyMesh
from ovseg_jax.train.batches import Batch, Rows, merge, unmerge
from ovseg_jax.train.calls import Calls, Params

CHOICES = {
    "cross_image": ("masks", "groups"),
    "mask_maps": ("final_tokens", "binding"),
    "mask_directions": ("both", "one"),
    "mask_cost": COSTS,
    "matching": BACKENDS,
}

# The images of a pair.
FIRST, SECOND = 0, 1


@struct.dataclass
class View:
    """One image of each pair by one model.

    Attributes:
      tokens: what the visual encoder gives.
      embedded: the groups in the joint space as they come, [B, K, E].
    """

    tokens: VisualTokens
    embedded: Float[Array, "B K E"]


def check_mask_config(config: ConfigDict) -> None:
    """Refuses a ``config.loss`` whose mask term cannot be computed.

    Raises:
      UserError: a field has none of its values, or two contradict each other.
    """
    for name, allowed in CHOICES.items():
        if config[name] not in allowed:
            listed = ", ".join(map(repr, allowed))
            raise UserError(f"config.loss.{name} is {config[name]!r}; it must be one of {listed}")
    masks = config.cross_image == "masks"
    if masks and config.mask_maps == "final_tokens" and config.mask_directions == "one":
        raise UserError(
            "config.loss.mask_directions = 'one' needs mask_maps = 'binding': the form on final "
            "tokens (Eq. 12) is symmetric"
        )


def check_matching(config: ConfigDict) -> None:
    """Refuses ``config.loss.matching = 'enumerate'`` for a model with too many groups to match.

    Raises:
      UserError: there are.
    """
    image, loss = config.model.image, config.loss
    if loss.cross_image != "masks" or loss.matching != "enumerate" or image.later_stages:
        return
    count = subgroup_count(image.num_groups, loss.group_ratio)
    if count > ENUMERATE_LIMIT:
        raise UserError(
            f"config.loss.matching = 'enumerate' takes at most {ENUMERATE_LIMIT} groups, but "
            f"{count} of {image.num_groups} are matched (config.loss.group_ratio): set it to "
            "'host' or 'device'"
        )


def online_images(config: ConfigDict) -> tuple[int, ...]:
    """Which images of a pair the online model must see (the teacher: see `teacher_views`)."""
    return (FIRST,) if config.mask_directions == "one" else (FIRST, SECOND)


def view(call: Calls, tokens: VisualTokens, params: Params | None = None) -> tuple[Array, View]:
    """The image embedding [B, E] and the groups' own, projected in this order.

    Both as they come. Where the projector has a batch norm, each call has its own statistics.
    """
    pooled = call("embed_image", jnp.mean(tokens.groups, axis=1), True, params=params)
    return pooled, View(tokens, call("embed_image", tokens.groups, True, params=params))


def teacher_views(
    call: Calls,
    teacher: Params,
    images: Sequence[Array],
    config: ConfigDict,
    *,
    rngs: Mapping[str, Array],
    noise: Mapping[str, Any] | None,
    mesh: AnyMesh | None,
) -> dict[int, View]:
    """The teacher's views of a pair; nothing flows back.

    Args:
      call: the online model; its projector serves the teacher too.
      teacher: the visual encoder's moving average.
      images: both images of the pair.
      noise: see `loss_terms`.
    """
    seen = (SECOND,) if config.mask_directions == "one" else (SECOND, FIRST)
    params = jax.lax.stop_gradient({**call.params, "image_encoder": teacher})
    # With draws of its own: the online pass has the same shapes, and would draw the same.
    rngs = {name: jax.random.fold_in(key, 1) for name, key in rngs.items()}
    given = merge(*(noise["teacher"][i] for i in seen)) if noise is not None else None
    tokens = call(
        "visual_tokens",
        merge(*(images[i] for i in seen)),
        config.teacher_noise,
        given,
        rngs=rngs,
        params=params,
    )
    parts = sharding.keep_split(unmerge(tokens, len(seen)), mesh)
    return {
        i: jax.lax.stop_gradient(view(call, part, params)[1])
        for i, part in zip(seen, parts, strict=True)
    }


def mask_rows(
    online: Mapping[int, View],
    teacher: Mapping[int, View],
    entity: Float[Array, "B E"],
    config: ConfigDict,
    *,
    grid: tuple[int, int],
    mesh: AnyMesh | None,
) -> Rows:
    """Cross-image consistency of each pair: of masks (Eq. 10-12), or what that of groups needs.

    Args:
      online, teacher: views by image.
      entity: 'a photo of e' of the shared entity in the joint space, as it comes.
      config: the run's ``config.loss``. `cross_image`: "masks", or "groups" (Table 6, see
        `contrastive.group_set_nce`), for which only `group_ratio` and `mask_directions` count.
        `mask_maps`: "final_tokens" (the paper's, see `mask_consistency`) or "binding" (the released
        model's, see `released_mask_consistency`, with `detached_ratio`, `mask_size` in pixels and
        `mask_cost`).
      grid: (rows, columns) of an image's patches.

    Returns:
      Of masks "mask_loss" and "target_fraction" [B]; of groups "own_groups" and "other_groups"
      [B, n, S, E], for each of the n directions.
    """
    entity = jax.lax.stop_gradient(entity)
    if config.cross_image == "groups":
        return _chosen_groups(online, teacher, entity, config)
    options = {"threshold": config.mask_threshold, "backend": config.matching, "mesh": mesh}
    if config.mask_maps == "final_tokens":
        per_pair, extra = consistency_loss(
            (_regions(online[FIRST]), _regions(online[SECOND])),
            (_regions(teacher[FIRST]), _regions(teacher[SECOND])),
            unit(entity),
            ratio=config.group_ratio,
            **options,
        )
    else:
        # A direction goes from an image by the online model to its partner by the teacher.
        directions = [(online[i], teacher[1 - i]) for i in online_images(config)]
        scores = [
            jnp.einsum("bke,be->bk", jax.lax.stop_gradient(own.embedded), entity)
            for own, _ in directions
        ]
        values, extra = group_mask_loss(
            merge(*(own.tokens.query for own, _ in directions)),
            merge(*(other.tokens.query for _, other in directions)),
            merge(*(other.tokens.key for _, other in directions)),
            merge(*scores),
            grid=grid,
            size=(config.mask_size, config.mask_size),
            detached_ratio=config.detached_ratio,
            cost=config.mask_cost,
            **options,
        )
        count = len(directions)
        per_pair = jnp.mean(values.reshape(-1, count), axis=1)
        extra = {name: jnp.mean(x.reshape(-1, count), axis=1) for name, x in extra.items()}
    return {"mask_loss": per_pair, "target_fraction": extra["target_fraction"]}


def _chosen_groups(
    online: Mapping[int, View],
    teacher: Mapping[int, View],
    entity: Float[Array, "B E"],
    config: ConfigDict,
) -> Rows:
    def chosen(one: View) -> Array:
        joint = unit(one.embedded)
        count = subgroup_count(joint.shape[1], config.group_ratio)
        places = select_groups(joint, unit(entity), count)
        return jnp.take_along_axis(joint, places[..., None], axis=1)

    directions = online_images(config)
    return {
        "own_groups": jnp.stack([chosen(online[i]) for i in directions], axis=1),
        "other_groups": jnp.stack([chosen(teacher[1 - i]) for i in directions], axis=1),
    }


def mask_term(
    rows: Rows, scale: Float[Array, ""], batch: Batch, config: ConfigDict
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The loss of a batch of pairs and its metrics, from what `mask_rows` gave.

    Args:
      scale: inverse temperature of the contrastive losses, for groups.
      config: the run's ``config.loss``. `mask_divisor`: 0 for the mean over pairs; else their sum
        is divided by it.
    """
    weight = batch["weight"] * batch["pair_weight"]
    if config.cross_image == "groups":
        own, other, negatives = rows["own_groups"], rows["other_groups"], negatives_mask(weight)
        values = [
            group_set_nce(own[:, i], other[:, i], scale, negatives) for i in range(own.shape[1])
        ]
        loss = weighted_mean(jnp.mean(jnp.stack(values), axis=0), weight)
        return loss, {"mask": loss}
    if config.mask_divisor:
        loss = divided_sum(rows["mask_loss"], weight, config.mask_divisor)
    else:
        loss = weighted_mean(rows["mask_loss"], weight)
    fraction = weighted_mean(rows["target_fraction"], weight)
    return loss, {"mask": loss, "mask_target_fraction": fraction}


def _regions(one: View) -> Regions:
    if one.tokens.patches is None:
        raise UserError(
            "config.loss.mask_maps = 'final_tokens' needs final patch tokens, which "
            "config.model.image.second_stage = 'groups' does not give: use mask_maps = 'binding'"
        )
    return Regions(one.tokens.patches, one.tokens.groups, unit(one.embedded))
