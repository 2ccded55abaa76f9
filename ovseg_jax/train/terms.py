"""From a batch to the loss terms: where model and losses meet (with `mask_terms`).

In two halves: what runs the model, example by example, and what compares examples.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from ovseg_jax import sharding
from ovseg_jax.data.captions import Masking
from ovseg_jax.errors import UserError
from ovseg_jax.losses.contrastive import false_negative_rate, info_nce, negatives_mask
from ovseg_jax.losses.objective import total_loss, weighted_mean
from ovseg_jax.models.ovsegmentor import OVSegmentor, unit
from ovseg_jax.shapes import Array, Float
from ovseg_jax.sharding import AnyMesh
from ovseg_jax.train.batches import Batch, Rows, merge, unmerge
from ovseg_jax.train.calls import Calls, Params
from ovseg_jax.train.entity_terms import (
    completion_rows,
    completion_term,
    masking_of,
    token_rows,
    token_term,
    within_set,
)
from ovseg_jax.train.mask_terms import (
    FIRST,
    SECOND,
    check_mask_config,
    mask_rows,
    mask_term,
    online_images,
    teacher_views,
    view,
)
from ovseg_jax.train.noun_terms import embed_with_nouns, noun_batch, noun_term
from ovseg_jax.train.texts import embed_sentences, encode_texts


def images_of(batch: Batch, second: bool) -> tuple[Array, ...]:
    """The batch's images, or cached features in their place: one, or both of a pair."""
    stem = "image_features" if "image_features" in batch else "image"
    names = (stem, stem.replace("image", "image2")) if second else (stem,)
    return tuple(batch[name] for name in names)


def grid_of(model: OVSegmentor, image: Array, patches: int) -> tuple[int, int]:
    """(rows, columns) of an image's patches.

    Args:
      image: of the batch, or cached features, whose grid is a square.

    Raises:
      UserError: cached features of a grid that is no square.
    """
    if image.ndim == 4:
        return image.shape[1] // model.image_encoder.patch, image.shape[2] // (
            model.image_encoder.patch
        )
    side = round(patches**0.5)
    if side * side != patches:
        raise UserError(
            f"cached features of {patches} patches are no square image: set "
            "config.data.cache_images = False"
        )
    return side, side


def usage_entropy(shares: Float[Array, "B K"], weight: Float[Array, "B"]) -> Float[Array, ""]:
    """Entropy of the groups' share of all patches, over log K: 1 if all are used alike.

    Args:
      shares: of each image's patches.
    """
    total = jnp.sum(shares * weight[:, None], axis=0)
    total = total / jnp.maximum(jnp.sum(total), 1e-6)
    entropy = -jnp.sum(total * jnp.log(jnp.maximum(total, 1e-9)))
    return entropy / jnp.log(float(shares.shape[-1]))


def example_rows(
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
) -> tuple[Rows, Params]:
    """All that runs the model: what each example contributes to the terms of Eq. 13.

    But for batch norms, no example's row depends on the others.

    Args:
      See `loss_terms`.

    Returns:
      The rows, and the running statistics after the step.
    """
    check_mask_config(config)
    call = Calls(model, params, statistics or {})
    with_mask, masking = mask_weight > 0, _masking(config)
    kinds = ("caption",)
    kinds += ("masked",) if masking and (masking.completes or masking.classifies) else ()
    kinds += ("prompt",) if masking and masking.completes else ()
    kinds += ("shared",) if with_mask else ()
    nouns: tuple[str, ...] = ()
    if _with_nouns(config, masking):
        batch, nouns = noun_batch(batch)
    texts = encode_texts(call, batch, kinds + nouns, text_dropout, rngs, mesh)
    images = images_of(batch, with_mask)
    seen = online_images(config) if with_mask else (FIRST,)
    visual = call(
        "visual_tokens",
        merge(*(images[i] for i in seen)),
        True,
        merge(*(noise["online"][i] for i in seen)) if noise is not None else None,
        rngs=rngs,
    )
    tokens = dict(zip(seen, sharding.keep_split(unmerge(visual, len(seen)), mesh), strict=True))
    rows: Rows = {}
    if nouns:
        rows["text"], rows["nouns"] = embed_with_nouns(call, texts, nouns)
    else:
        rows["text"] = unit(embed_sentences(call, texts["caption"]))
    embedded, first = view(call, tokens[FIRST])
    rows["image"] = unit(embedded)
    if model.image_head:
        rows["whole"] = call("embed_whole", tokens[FIRST], True, rngs=rngs)
        rows["whole_text"] = call("embed_whole_text", texts["caption"].pooled, True)
    rows["group_shares"] = jnp.mean(first.tokens.affinity, axis=1)
    if masking is not None and masking.classifies:
        rows |= token_rows(call, texts, first.tokens.groups, batch)
    elif masking is not None and masking.completes:
        rows |= completion_rows(call, texts, first.tokens.groups)
    if with_mask:
        drawn = teacher_views(call, teacher, images, config, rngs=rngs, noise=noise, mesh=mesh)
        shared = embed_sentences(call, texts["shared"])
        online = {FIRST: first}
        if SECOND in seen:
            online[SECOND] = view(call, tokens[SECOND])[1]
            if call.statistics:
                embed_sentences(call, texts["shared"])  # once for each direction
        grid = grid_of(model, images[SECOND], first.tokens.affinity.shape[1])
        rows |= mask_rows(online, drawn, shared, config, grid=grid, mesh=mesh)
    return rows, call.statistics


def joint_loss(
    model: OVSegmentor,
    params: Params,
    rows: Rows,
    batch: Batch,
    config: ConfigDict,
    *,
    mask_weight: float,
    mesh: AnyMesh | None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Eq. 13 from the rows of all examples; of the parameters only the temperature matters.

    Args:
      See `loss_terms`.

    Returns:
      The total loss and the metrics (scalars).
    """
    scale = Calls(model, params, {})("logit_scale")
    masking, weight = _masking(config), batch["weight"]
    equal = batch["caption_set"] if config.get("mask_equal_captions", False) else None
    negatives = negatives_mask(weight, equal, within=within_set(batch, config))
    values, hits = info_nce(rows["image"], rows["text"], scale, negatives)
    contrastive = weighted_mean(values, weight)
    metrics = {
        "contrastive": contrastive,
        "image_to_text": weighted_mean(hits.astype(jnp.float32), weight),
        "temperature": 1.0 / scale,
        "group_usage": usage_entropy(rows["group_shares"], weight),
    }
    if equal is not None:
        metrics["equal_captions"] = false_negative_rate(weight, equal)
    entity = mask = None
    if masking is Masking.MULTI_LABEL:
        entity, extra = noun_term(rows["image"], rows["nouns"], scale, batch), {}
        metrics |= {"entity": entity}
    elif masking is not None:
        if masking.classifies:
            entity, extra = token_term(rows, batch)
        else:
            entity, extra = completion_term(rows, scale, batch, config)
        metrics |= {"entity": entity, **extra}
    if mask_weight > 0:
        mask, extra = mask_term(rows, scale, batch, config)
        metrics |= extra
    if "whole" in rows:
        whole_scale = Calls(model, params, {})("whole_logit_scale")
        values, hits = info_nce(rows["whole"], rows["whole_text"], whole_scale, negatives)
        metrics["whole_contrastive"] = weighted_mean(values, weight)
        metrics["whole_to_text"] = weighted_mean(hits.astype(jnp.float32), weight)
    weights = {"entity_weight": config.entity_weight, "mask_weight": mask_weight}
    loss = total_loss(contrastive, entity, mask, **weights)
    if "nouns" in rows and masking is not Masking.MULTI_LABEL:
        metrics["nouns"] = noun_term(rows["image"], rows["nouns"], scale, batch)
        loss = loss + config.noun_weight * metrics["nouns"]
    if "whole" in rows:
        # The head is no part of Eq. 13: what it learns is used beside the groups.
        loss = loss + metrics["whole_contrastive"]
    return loss, {"loss": loss, **metrics}


def loss_terms(
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
) -> tuple[Float[Array, ""], tuple[dict[str, Array], Params]]:
    """Eq. 13 on one batch.

    Args:
      params: the online model's. teacher: its visual encoder's EMA, needed where mask_weight > 0.
      batch: device arrays, see `ovseg_jax.data.loader`.
      config: the run's ``config.loss``.
      mask_weight: lambda of Eq. 13. At 0 the second image is not read and no teacher runs.
      text_dropout: dropout on in the text encoder.
      statistics: running statistics of the model's batch norms; None where it has none.
      noise: Gumbel noise in place of draws, for comparison with other code: "online" and "teacher"
        map the images 0 and 1 of a pair to [B, L, K].

    Returns:
      The total loss; the metrics (scalars) and the running statistics after the step.
    """
    rows, statistics = example_rows(
        model,
        params,
        teacher,
        batch,
        config,
        mask_weight=mask_weight,
        text_dropout=text_dropout,
        rngs=rngs,
        mesh=mesh,
        statistics=statistics,
        noise=noise,
    )
    loss, metrics = joint_loss(
        model, params, rows, batch, config, mask_weight=mask_weight, mesh=mesh
    )
    return loss, (metrics, statistics)


def _masking(config: ConfigDict) -> Masking | None:
    """The entity objective; None where there is none."""
    return masking_of(config) if config.entity_weight > 0 else None


def _with_nouns(config: ConfigDict, masking: Masking | None) -> bool:
    return config.get("noun_weight", 0.0) > 0 or masking is Masking.MULTI_LABEL
