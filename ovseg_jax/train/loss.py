"""From a batch to the loss (Eq. 13): where model and losses meet.

In two halves: `per_example_outputs` runs the model, and `joint_loss` compares examples.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import struct
from ml_collections import ConfigDict

from ovseg_jax import sharding
from ovseg_jax.data.captions import Masking
from ovseg_jax.losses.contrastive import (
    false_negative_rate,
    info_nce,
    multi_label_info_nce,
    negatives_mask,
)
from ovseg_jax.losses.objective import masked_token_loss, total_loss, weighted_mean
from ovseg_jax.models.ovsegmentor import OVSegmentor, unit
from ovseg_jax.shapes import Array, Float
from ovseg_jax.sharding import AnyMesh
from ovseg_jax.train.apply import (
    Batch,
    Params,
    apply,
    embed_sentences,
    encode_texts,
    grid_of,
    images_of,
    merge,
    see_sentences,
    unmerge,
    within_set,
)
from ovseg_jax.train.mask_terms import (
    FIRST,
    SECOND,
    PairOutputs,
    mask_term,
    online_images,
    pair_outputs,
    teacher_views,
    view,
)


@struct.dataclass
class Outputs:
    """What each example contributes to the losses. Fields of terms that are off are None.

    Accumulation stacks those of several micro-batches, hence the axes "*parts".

    Attributes:
      image, text: unit norm, of Eq. 7.
      whole, whole_text: of the image head's contrast, `whole` times its inverse temperature.
      group_shares: the share of the image's patches that each group has.
      nouns: unit norm, of T nouns of the caption.
      completed, prompt: unit norm, of Eq. 9.
      token_loss, tokens, token_hits: of masked language modeling: the loss, the number of masked
        tokens and of those that are classified right.
      pair: of the mask term.
    """

    image: Float[Array, "*parts B E"]
    text: Float[Array, "*parts B E"]
    group_shares: Float[Array, "*parts B K"]
    whole: Float[Array, "*parts B E"] | None = None
    whole_text: Float[Array, "*parts B E"] | None = None
    nouns: Float[Array, "*parts B T E"] | None = None
    completed: Float[Array, "*parts B E"] | None = None
    prompt: Float[Array, "*parts B E"] | None = None
    token_loss: Float[Array, "*parts B"] | None = None
    tokens: Float[Array, "*parts B"] | None = None
    token_hits: Float[Array, "*parts B"] | None = None
    pair: PairOutputs | None = None


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
    """Runs the model: what each example contributes to the terms of Eq. 13.

    Apart from batch norms, no example's outputs depend on the others.

    Args:
      params: the online model's. teacher: its visual encoder's EMA, needed where mask_weight > 0.
      batch: device arrays, see `ovseg_jax.data.loader`.
      config: the run's ``config.loss``.
      mask_weight: lambda of Eq. 13. At 0 the second image is not read and no teacher runs.
      text_dropout: dropout on in the text encoder.
      statistics: running statistics of the model's batch norms; None or {} where it has none.
      noise: Gumbel noise in place of draws, for comparison with other code: "online" and "teacher"
        map the images 0 and 1 of a pair to [B, L, K].

    Returns:
      The outputs, and the running statistics after the step, which depend on the order of the
      projections; it is the released training's.
    """
    statistics = statistics or {}
    call = partial(apply, model, params)
    embed = partial(embed_sentences, model, params)
    masking, with_mask = masking_of(config), mask_weight > 0
    nouns: tuple[str, ...] = ()
    if config.noun_weight > 0 or masking is Masking.MULTI_LABEL:
        batch, nouns = _nouns_as_texts(batch)
    kinds = ("caption", *_texts_of(masking), *(("shared",) if with_mask else ()), *nouns)
    texts = encode_texts(model, params, batch, kinds, text_dropout, rngs, mesh)

    images = images_of(batch, with_mask)
    seen = online_images(config) if with_mask else (FIRST,)
    merged = merge(*(images[i] for i in seen))
    given = merge(*(noise["online"][i] for i in seen)) if noise is not None else None
    variables = {"params": params}
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
        statistics = see_sentences(model, params, statistics, masked)
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
            statistics = see_sentences(model, params, statistics, texts["shared"])
        grid = grid_of(model, images[SECOND], first.tokens.affinity.shape[1])
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
    """Eq. 13 from the outputs of all examples.

    Args:
      scale: inverse temperature.
      The others: see `per_example_outputs`.

    Returns:
      The total loss and the metrics (scalars).
    """
    masking, weight = masking_of(config), batch["weight"]
    equal = batch["caption_set"] if config.mask_equal_captions else None
    negatives = negatives_mask(weight, equal, within=within_set(batch, config))
    values, hits = info_nce(outputs.image, outputs.text, scale, negatives)
    contrastive = weighted_mean(values, weight)
    metrics = {
        "contrastive": contrastive,
        "image_to_text": weighted_mean(hits.astype(jnp.float32), weight),
        "temperature": 1.0 / scale,
        "group_usage": usage_entropy(outputs.group_shares, weight),
    }
    if equal is not None:
        metrics["equal_captions"] = false_negative_rate(weight, equal, within_set(batch, config))
    entity = mask = None
    if masking is Masking.MULTI_LABEL:
        metrics["entity"] = entity = noun_term(outputs, scale, batch, config)
    elif masking is not None:
        if masking.classifies:
            entity, extra = token_term(outputs, batch)
        else:
            entity, extra = completion_term(outputs, scale, batch, config)
        metrics |= {"entity": entity, **extra}
    if mask_weight > 0:
        mask, extra = mask_term(outputs.pair, scale, batch, config)
        metrics |= extra
    weights = {"entity_weight": config.entity_weight, "mask_weight": mask_weight}
    loss = total_loss(contrastive, entity, mask, **weights)
    if outputs.nouns is not None and masking is not Masking.MULTI_LABEL:
        metrics["nouns"] = noun_term(outputs, scale, batch, config)
        loss = loss + config.noun_weight * metrics["nouns"]
    if outputs.whole is not None:
        # The image head is not in Eq. 13: what it learns is used beside the groups.
        values, hits = info_nce(outputs.whole, outputs.whole_text, jnp.float32(1.0), negatives)
        metrics["whole_contrastive"] = weighted_mean(values, weight)
        metrics["whole_to_text"] = weighted_mean(hits.astype(jnp.float32), weight)
        loss = loss + metrics["whole_contrastive"]
    return loss, {"loss": loss, **metrics}


# ---- terms


def completion_term(
    outputs: Outputs,
    scale: Float[Array, ""],
    batch: Batch,
    config: ConfigDict,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Eq. 9, and the share of negatives that name the same entities.

    Args:
      config: the run's ``config.loss``, which says whether answers of equal captions are no
        negatives of one another (`mask_equal_captions`).
    """
    weight, sets = batch["weight"] * batch["entity_weight"], batch["entity_set"]
    negatives = negatives_mask(
        weight,
        batch["caption_set"] if config.mask_equal_captions else None,
        within=within_set(batch, config),
    )
    values, _ = info_nce(outputs.completed, outputs.prompt, scale, negatives)
    rate = false_negative_rate(weight, sets, within_set(batch, config))
    return weighted_mean(values, weight), {"entity_false_negatives": rate}


def token_term(outputs: Outputs, batch: Batch) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Masked language modeling: a mean over the examples that have a masked token."""
    weight = batch["weight"] * (outputs.tokens > 0).astype(jnp.float32)
    counted = (weight > 0).astype(jnp.float32)
    tokens = jnp.sum(counted * outputs.tokens)
    accuracy = jnp.sum(counted * outputs.token_hits) / jnp.maximum(tokens, 1.0)
    return weighted_mean(outputs.token_loss, weight), {"token_accuracy": accuracy}


def noun_term(
    outputs: Outputs, scale: Float[Array, ""], batch: Batch, config: ConfigDict
) -> Float[Array, ""]:
    """An image against sampled nouns of its caption (GroupViT): a mean over captions with nouns."""
    present = batch["noun_present"]
    weight = batch["weight"] * jnp.any(present, axis=1).astype(jnp.float32)
    negatives = negatives_mask(batch["weight"], within=within_set(batch, config))
    values = multi_label_info_nce(outputs.image, outputs.nouns, scale, negatives, present)
    return weighted_mean(values, weight)


def usage_entropy(shares: Float[Array, "B K"], weight: Float[Array, "B"]) -> Float[Array, ""]:
    """Entropy of the groups' share of all patches, over log K: 1 if all are used alike.

    Args:
      shares: of each image's patches.
    """
    total = jnp.sum(shares * weight[:, None], axis=0)
    total = total / jnp.maximum(jnp.sum(total), 1e-6)
    entropy = -jnp.sum(total * jnp.log(jnp.maximum(total, 1e-9)))
    return entropy / jnp.log(float(shares.shape[-1]))


def masking_of(config: ConfigDict) -> Masking | None:
    """The entity objective of ``config.loss``; None where its weight is 0."""
    return Masking(config.masking) if config.entity_weight > 0 else None


def _texts_of(masking: Masking | None) -> tuple[str, ...]:
    """The texts of a batch that the entity objective reads."""
    if masking is None or masking is Masking.MULTI_LABEL:
        return ()
    return ("masked", "prompt") if masking.completes else ("masked",)


def _nouns_as_texts(batch: Batch) -> tuple[Batch, tuple[str, ...]]:
    """The batch with each noun as a text, and the names of these texts."""
    ids = batch["noun_ids"]
    names = tuple(f"noun_{index}" for index in range(ids.shape[1]))
    return {**batch, **{f"{name}_ids": ids[:, i] for i, name in enumerate(names)}}, names
