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
from ovseg_jax.losses import contrastive
from ovseg_jax.losses.contrastive import info_nce, negatives_mask
from ovseg_jax.losses.objective import masked_token_loss, total_loss, weighted_mean
from ovseg_jax.models.ovsegmentor import OVSegmentor, unit
from ovseg_jax.shapes import Array, Float
from ovseg_jax.sharding import AnyMesh
from ovseg_jax.train import apply, mask_terms
from ovseg_jax.train.apply import Batch, Params, merge, unmerge, within_set
from ovseg_jax.train.mask_terms import FIRST, SECOND, PairOutputs


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
    seen = mask_terms.online_images(config) if with_mask else (FIRST,)
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
    image, first, statistics = mask_terms.view(model, params, statistics, tokens[FIRST])
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
        drawn, statistics = mask_terms.teacher_views(
            model, params, statistics, teacher, images, config, rngs=rngs, noise=noise, mesh=mesh
        )
        shared, statistics = embed(statistics, texts["shared"])
        online = {FIRST: first}
        if SECOND in seen:
            _, online[SECOND], statistics = mask_terms.view(
                model, params, statistics, tokens[SECOND]
            )
            # The released training embeds the shared sentences once for each direction.
            statistics = see(statistics, texts["shared"])
        grid = apply.grid_of(model, images[SECOND], first.tokens.affinity.shape[1])
        optional["pair"] = mask_terms.pair_outputs(
            online, drawn, shared, config, grid=grid, mesh=mesh
        )
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
        mask, extra = mask_terms.mask_term(outputs.pair, scale, batch, config)
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
