"""From a batch to the loss terms: the one place that knows both the model and the losses."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ovseg_jax import sharding
from ovseg_jax.losses.contrastive import candidate_pairs, false_negative_rate, info_nce
from ovseg_jax.losses.mask_consistency import Regions, consistency_loss
from ovseg_jax.losses.objective import total_loss, weighted_mean
from ovseg_jax.models.ovsegmentor import OVSegmentor
from ovseg_jax.models.vit import VisualTokens
from ovseg_jax.shapes import Array, Bool, Float

Batch = Mapping[str, Array]
Params = Mapping[str, Any]

TEXTS = ("caption", "masked", "prompt", "shared")


@struct.dataclass
class Texts:
    """Sentence vectors of the captions, prompts and shared entities, token features of the masked
    captions. Those that a step does not use are None."""

    caption: Float[Array, "B Dt"]
    prompt: Float[Array, "B Dt"] | None
    masked: Float[Array, "B M Dt"] | None
    masked_mask: Bool[Array, "B M"] | None
    shared: Float[Array, "B Dt"] | None


def merge(*parts: Array) -> Array:
    """n arrays [B, ...] as one [n B, ...] whose rows of one example stay neighbors.

    Concatenating would move every row to another device when the batch is split.
    """
    return jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])


def unmerge(x: Any, count: int) -> list[Any]:
    """Inverse of `merge`, over the leaves of a tree."""
    leaves, structure = jax.tree.flatten(x)
    apart = [leaf.reshape(-1, count, *leaf.shape[1:]) for leaf in leaves]
    return [structure.unflatten([leaf[:, i] for leaf in apart]) for i in range(count)]


def encode_texts(
    model: OVSegmentor, params: Params, batch: Batch, kinds: tuple[str, ...], train: bool, rngs: Any
) -> Texts:
    """All the texts of a batch in one pass of the text encoder, or from the batch if cached.

    Args:
      kinds: which of `TEXTS` the step needs; "caption" always.
      train: dropout on.
    """
    if "caption_pooled" in batch:

        def cached(kind: str) -> Array | None:
            return batch[f"{kind}_pooled"].astype(jnp.float32) if kind in kinds else None

        masked = batch["masked_tokens"].astype(jnp.float32) if "masked" in kinds else None
        mask = batch["masked_mask"] if "masked" in kinds else None
        return Texts(cached("caption"), cached("prompt"), masked, mask, cached("shared"))
    ids = merge(*(batch[f"{kind}_ids"] for kind in kinds))
    text = model.apply({"params": params}, ids, train, method="text_tokens", rngs=rngs)
    parts = dict(zip(kinds, unmerge(text, len(kinds)), strict=True))

    def pooled(kind: str) -> Array | None:
        return parts[kind].pooled if kind in parts else None

    masked = parts.get("masked")
    return Texts(
        caption=pooled("caption"),
        prompt=pooled("prompt"),
        masked=masked.tokens if masked is not None else None,
        masked_mask=masked.mask if masked is not None else None,
        shared=pooled("shared"),
    )


def images_of(batch: Batch, second: bool) -> tuple[Array, ...]:
    """The batch's images, or cached features in their place: one, or both of a pair."""
    stem = "image_features" if "image_features" in batch else "image"
    names = (stem, stem.replace("image", "image2")) if second else (stem,)
    return tuple(batch[name] for name in names)


def group_usage(affinity: Float[Array, "B L K"], weight: Float[Array, "B"]) -> Float[Array, ""]:
    """Entropy of the groups' share of all patches, over log K: 1 if all are used alike."""
    shares = jnp.sum(jnp.mean(affinity, axis=1) * weight[:, None], axis=0)
    shares = shares / jnp.maximum(jnp.sum(shares), 1e-6)
    entropy = -jnp.sum(shares * jnp.log(jnp.maximum(shares, 1e-9)))
    return entropy / jnp.log(float(affinity.shape[-1]))


def loss_terms(
    model: OVSegmentor,
    params: Params,
    teacher: Params | None,
    batch: Batch,
    config: ConfigDict,
    *,
    mask_weight: float,
    text_trains: bool,
    rngs: Mapping[str, Array],
    mesh: Mesh | None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Eq. 13 on one batch.

    Args:
      params: the online model's. teacher: its visual encoder's EMA, needed where mask_weight > 0.
      batch: device arrays, see `ovseg_jax.data.pipeline`.
      config: the run's ``config.loss``.
      mask_weight: lambda of Eq. 13. At 0 the second image is not read and no teacher runs.
      text_trains: dropout on in the text encoder.

    Returns:
      The total loss and the metrics, scalars.
    """
    variables = {"params": params}
    with_entity, with_mask = config.entity_weight > 0, mask_weight > 0
    kinds = ("caption",)
    kinds += ("masked", "prompt") if with_entity else ()
    kinds += ("shared",) if with_mask else ()
    texts = sharding.keep_split(encode_texts(model, params, batch, kinds, text_trains, rngs), mesh)
    images = images_of(batch, with_mask)
    visual = model.apply(variables, merge(*images), True, method="visual_tokens", rngs=rngs)
    online: list[VisualTokens] = sharding.keep_split(unmerge(visual, len(images)), mesh)
    first = online[0]

    def project_image(tokens: Array) -> Array:
        return model.apply(variables, tokens, method="project_image")

    def project_text(pooled: Array) -> Array:
        return model.apply(variables, pooled, method="project_text")

    scale = model.apply(variables, method="logit_scale")
    weight = batch["weight"]
    z_image = project_image(jnp.mean(first.groups, axis=1))
    z_text = project_text(texts.caption)
    contrastive = weighted_mean(info_nce(z_image, z_text, scale, candidate_pairs(weight)), weight)
    nearest = jnp.argmax(jnp.einsum("ie,je->ij", z_image, z_text), axis=1)
    hits = (nearest == jnp.arange(nearest.shape[0])).astype(jnp.float32)
    metrics = {
        "contrastive": contrastive,
        "image_to_text": weighted_mean(hits, weight),
        "temperature": 1.0 / scale,
        "group_usage": group_usage(first.affinity, weight),
    }
    entity = mask = None
    if with_entity:
        entity_weight = weight * batch["entity_weight"]
        z_masked = model.apply(
            variables, texts.masked, texts.masked_mask, first.groups, method="complete"
        )
        sets = batch["entity_set"]
        pairs = candidate_pairs(entity_weight, sets if config.mask_equal_entities else None)
        entity = weighted_mean(
            info_nce(z_masked, project_text(texts.prompt), scale, pairs), entity_weight
        )
        metrics["entity"] = entity
        metrics["entity_false_negatives"] = false_negative_rate(entity_weight, sets)
    if with_mask:
        teacher_params = {**params, "image_encoder": teacher}
        # The target is drawn without noise and without stochastic depth.
        target = model.apply(
            {"params": jax.lax.stop_gradient(teacher_params)},
            merge(*images),
            False,
            method="visual_tokens",
        )

        def regions(tokens: VisualTokens) -> Regions:
            return Regions(tokens.patches, tokens.groups, project_image(tokens.groups))

        per_pair, extra = consistency_loss(
            (regions(online[0]), regions(online[1])),
            tuple(regions(tokens) for tokens in sharding.keep_split(unmerge(target, 2), mesh)),
            jax.lax.stop_gradient(project_text(texts.shared)),
            ratio=config.group_ratio,
            threshold=config.mask_threshold,
            backend=config.matching,
            mesh=mesh,
        )
        pair_weight = weight * batch["pair_weight"]
        mask = weighted_mean(per_pair, pair_weight)
        metrics["mask"] = mask
        metrics["mask_target_fraction"] = weighted_mean(extra["target_fraction"], pair_weight)
    loss = total_loss(
        contrastive,
        entity,
        mask,
        entity_weight=config.entity_weight,
        mask_weight=mask_weight,
    )
    return loss, {"loss": loss, **metrics}
