"""From a batch to the loss (Eq. 13): where model and losses meet.

In two halves: `per_example_outputs` runs the model, and `joint_loss` compares examples. The mask
term has its own section: which model sees which image, and which form compares them.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from ml_collections import ConfigDict

from ovseg_jax import sharding
from ovseg_jax.data.captions import Masking
from ovseg_jax.errors import UserError
from ovseg_jax.losses import contrastive
from ovseg_jax.losses import mask_consistency as consistency
from ovseg_jax.losses.contrastive import group_set_nce, info_nce, negatives_mask
from ovseg_jax.losses.objective import (
    divided_sum,
    masked_token_loss,
    total_loss,
    weighted_mean,
)
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


@struct.dataclass
class Outputs:
    """What each example contributes to the losses. Fields of terms that are off are None.

    Embeddings have unit norm. Accumulation stacks those of micro-batches, hence "*parts".
    """

    image: Float[Array, "*parts B E"]
    text: Float[Array, "*parts B E"]
    group_shares: Float[Array, "*parts B K"]  # of the image's patches
    whole: Float[Array, "*parts B E"] | None = None  # image head, times its inverse temperature
    whole_text: Float[Array, "*parts B E"] | None = None
    nouns: Float[Array, "*parts B T E"] | None = None
    completed: Float[Array, "*parts B E"] | None = None  # Eq. 9
    prompt: Float[Array, "*parts B E"] | None = None
    token_loss: Float[Array, "*parts B"] | None = None  # masked language modeling
    tokens: Float[Array, "*parts B"] | None = None  # number of masked ones
    token_hits: Float[Array, "*parts B"] | None = None  # number of those classified right
    pair: PairOutputs | None = None  # mask term


def per_example_outputs(
    model: OVSegmentor,
    params: Params,
    teacher: Params | None,
    batch: Batch,
    config: ConfigDict,
    *,
    mask_weight: float,
    text_dropout: bool,
    rngs: Mapping[str, Array],
    mesh: AnyMesh | None,
    statistics: Params | None = None,
    noise: Mapping[str, Any] | None = None,
) -> tuple[Outputs, Params]:
    """Runs the model: what each example contributes to Eq. 13; and the running statistics after.

    Apart from batch norms, no example's outputs depend on the others. The statistics depend on the
    order of the projections, which is the released training's.

    Args:
      params: the online model's. teacher: its visual encoder's EMA, needed where mask_weight > 0.
      batch: device arrays, see `data.examples`. config: the run's ``config.loss``.
      mask_weight: lambda of Eq. 13. At 0 the second image is not read and no teacher runs.
      noise: Gumbel noise in place of draws, for comparison with other code: "online" and "teacher"
        map the images 0 and 1 of a pair to [B, L, K].
    """
    statistics, variables = statistics or {}, {"params": params}
    call = partial(apply.apply, model, params)
    embed = partial(apply.embed_sentences, model, params)
    see = partial(apply.see_sentences, model, params)
    masking, with_mask = masking_of(config), mask_weight > 0

    nouns: tuple[str, ...] = ()
    if config.noun_weight > 0 or masking is Masking.MULTI_LABEL:
        ids = batch["noun_ids"]
        nouns = tuple(f"noun_{index}" for index in range(ids.shape[1]))
        batch = {**batch, **{f"{name}_ids": ids[:, i] for i, name in enumerate(nouns)}}
    kinds = ["caption"]
    if masking not in (None, Masking.MULTI_LABEL):
        kinds += ["masked", "prompt"] if masking.completes else ["masked"]
    kinds = (*kinds, *(["shared"] if with_mask else []), *nouns)
    texts = apply.encode_texts(model, params, batch, kinds, text_dropout, rngs, mesh)

    stem = "image_features" if "image_features" in batch else "image"
    names = (stem, stem.replace("image", "image2"))[: 1 + with_mask]
    images = tuple(batch[name] for name in names)
    seen = online_images(config) if with_mask else (FIRST,)
    merged = merge(*(images[i] for i in seen))
    given = merge(*(noise["online"][i] for i in seen)) if noise is not None else None
    visual = model.apply(variables, merged, True, given, method="visual_tokens", rngs=rngs)
    tokens = dict(zip(seen, sharding.keep_split(unmerge(visual, len(seen)), mesh), strict=True))

    optional: dict[str, Any] = {}
    if nouns:
        # One call of the projector: where it has a batch norm, they share its statistics.
        parts = [texts[name].pooled for name in ("caption", *nouns)]
        embedded, statistics = call(statistics, "embed_text", merge(*parts), True)
        text, *of_nouns = unmerge(unit(embedded), len(parts))
        optional["nouns"] = jnp.stack(of_nouns, axis=1)
    else:
        embedded, statistics = embed(statistics, texts["caption"])
        text = unit(embedded)
    image, first, statistics = view(model, params, statistics, tokens[FIRST])
    if model.image_head:
        whole = model.apply(variables, tokens[FIRST], True, method="embed_whole", rngs=rngs)
        optional["whole"] = whole * model.apply(variables, method="whole_logit_scale")
        optional["whole_text"] = model.apply(
            variables, texts["caption"].pooled, method="embed_whole_text"
        )
    groups = first.tokens.groups
    if masking is not None and masking.completes:
        masked = texts["masked"]
        statistics = see(statistics, masked)
        prompt, statistics = embed(statistics, texts["prompt"])
        optional["prompt"] = unit(prompt)
        optional["completed"], statistics = call(
            statistics, "complete", masked.tokens, masked.mask, groups, True
        )
    elif masking is not None and masking.classifies:
        masked, targets = texts["masked"], batch["masked_targets"]
        logits = model.apply(
            variables, masked.tokens, masked.mask, groups, method="classify_tokens"
        )
        hidden = targets >= 0
        hits = (logits.argmax(axis=-1) == targets) & hidden
        optional["token_loss"] = masked_token_loss(logits, targets)
        optional["tokens"] = hidden.sum(axis=1).astype(jnp.float32)
        optional["token_hits"] = hits.sum(axis=1).astype(jnp.float32)
    if with_mask:
        drawn, statistics = teacher_views(
            model, params, statistics, teacher, images, config, rngs=rngs, noise=noise, mesh=mesh
        )
        shared, statistics = embed(statistics, texts["shared"])
        online = {FIRST: first}
        if SECOND in seen:
            _, online[SECOND], statistics = view(model, params, statistics, tokens[SECOND])
            # The released training embeds the shared sentences once for each direction.
            statistics = see(statistics, texts["shared"])
        grid = apply.grid_of(model, images[SECOND], first.tokens.affinity.shape[1])
        optional["pair"] = pair_outputs(online, drawn, shared, config, grid=grid, mesh=mesh)
    shares = jnp.mean(first.tokens.affinity, axis=1)
    return Outputs(unit(image), text, shares, **optional), statistics


def joint_loss(
    scale: Float[Array, ""],
    outputs: Outputs,
    batch: Batch,
    config: ConfigDict,
    *,
    mask_weight: float,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Eq. 13 from the outputs of all examples, and metrics; `scale` is 1 / temperature."""
    masking, weight, within = masking_of(config), batch["weight"], within_set(batch, config)
    equal = batch["caption_set"] if config.mask_equal_captions else None
    negatives = negatives_mask(weight, equal, within=within)
    values, hits = info_nce(outputs.image, outputs.text, scale, negatives)
    caption_loss = weighted_mean(values, weight)
    # Entropy of the groups' share of all patches, over log K: 1 if all are used alike.
    shares = jnp.sum(outputs.group_shares * weight[:, None], axis=0)
    shares = shares / jnp.maximum(jnp.sum(shares), 1e-6)
    entropy = -jnp.sum(shares * jnp.log(jnp.maximum(shares, 1e-9)))
    metrics = {
        "contrastive": caption_loss,
        "image_to_text": weighted_mean(hits.astype(jnp.float32), weight),
        "temperature": 1.0 / scale,
        "group_usage": entropy / jnp.log(float(shares.shape[0])),
    }
    if equal is not None:
        metrics["equal_captions"] = contrastive.false_negative_rate(weight, equal, within)
    noun_loss = None
    if outputs.nouns is not None:
        # An image against sampled nouns of its caption (GroupViT): a mean over captions with nouns.
        present = batch["noun_present"]
        values = contrastive.multi_label_info_nce(
            outputs.image, outputs.nouns, scale, negatives_mask(weight, within=within), present
        )
        noun_loss = weighted_mean(values, weight * jnp.any(present, axis=1).astype(jnp.float32))
    mask = entity = None
    if masking is Masking.MULTI_LABEL:
        metrics["entity"] = entity = noun_loss
    elif masking is not None and masking.classifies:
        # Masked language modeling: a mean over the examples that have a masked token.
        with_tokens = weight * (outputs.tokens > 0).astype(jnp.float32)
        counted = (with_tokens > 0).astype(jnp.float32)
        count = jnp.maximum(jnp.sum(counted * outputs.tokens), 1.0)
        metrics["entity"] = entity = weighted_mean(outputs.token_loss, with_tokens)
        metrics["token_accuracy"] = jnp.sum(counted * outputs.token_hits) / count
    elif masking is not None:
        # Eq. 9, and the share of negatives that name the same entities.
        named = weight * batch["entity_weight"]
        others = negatives_mask(named, equal, within=within)
        values, _ = info_nce(outputs.completed, outputs.prompt, scale, others)
        metrics["entity"] = entity = weighted_mean(values, named)
        rate = contrastive.false_negative_rate(named, batch["entity_set"], within)
        metrics["entity_false_negatives"] = rate
    if mask_weight > 0:
        mask, extra = mask_term(outputs.pair, scale, batch, config)
        metrics |= extra
    weights = {"entity_weight": config.entity_weight, "mask_weight": mask_weight}
    loss = total_loss(caption_loss, entity, mask, **weights)
    if noun_loss is not None and masking is not Masking.MULTI_LABEL:
        metrics["nouns"] = noun_loss
        loss = loss + config.noun_weight * noun_loss
    if outputs.whole is not None:
        # The image head is not in Eq. 13: what it learns is used beside the groups.
        values, hits = info_nce(outputs.whole, outputs.whole_text, jnp.float32(1.0), negatives)
        metrics["whole_contrastive"] = weighted_mean(values, weight)
        metrics["whole_to_text"] = weighted_mean(hits.astype(jnp.float32), weight)
        loss = loss + metrics["whole_contrastive"]
    return loss, {"loss": loss, **metrics}


def masking_of(config: ConfigDict) -> Masking | None:
    """The entity objective of ``config.loss``; None where its weight is 0."""
    return Masking(config.masking) if config.entity_weight > 0 else None


# ---- the mask term


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
