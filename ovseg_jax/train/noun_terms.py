"""The multi-label contrastive term: an image against sampled nouns of its caption (GroupViT)."""

from collections.abc import Mapping

import jax.numpy as jnp
from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.losses.contrastive import multi_label_info_nce, negatives_mask
from ovseg_jax.losses.objective import weighted_mean
from ovseg_jax.models.ovsegmentor import unit
from ovseg_jax.shapes import Array, Float
from ovseg_jax.train.batches import Batch, merge, unmerge
from ovseg_jax.train.calls import Calls
from ovseg_jax.train.texts import Sentences


def check_noun_config(config: ConfigDict) -> None:
    """Refuses a config whose noun term cannot be computed.

    Raises:
      UserError: `loss.noun_weight` without nouns in the data, or with cached texts.
    """
    if config.loss.noun_weight and not config.data.nouns:
        raise UserError(
            "config.loss.noun_weight > 0 needs nouns: set config.data.nouns, for example to 3"
        )
    if config.data.nouns and config.data.cache_texts:
        raise UserError(
            "config.data.nouns draws other sentences each time, which config.data.cache_texts "
            "does not hold: set one of them to 0 or False"
        )


def noun_batch(batch: Batch) -> tuple[Batch, tuple[str, ...]]:
    """The batch with every noun as a text of its own, and the names of these texts."""
    ids = batch["noun_ids"]
    names = tuple(f"noun_{index}" for index in range(ids.shape[1]))
    return {**batch, **{f"{name}_ids": ids[:, i] for i, name in enumerate(names)}}, names


def embed_with_nouns(
    call: Calls, texts: Mapping[str, Sentences], names: tuple[str, ...]
) -> tuple[Float[Array, "B E"], Float[Array, "B T E"]]:
    """Captions and nouns in the joint space, unit norm.

    All in one call of the projector: where it has a batch norm, they share its statistics.
    """
    parts = [texts[name].pooled for name in ("caption", *names)]
    caption, *nouns = unmerge(unit(call("embed_text", merge(*parts), True)), len(parts))
    return caption, jnp.stack(nouns, axis=1)


def noun_term(
    image: Float[Array, "B E"],
    nouns: Float[Array, "B T E"],
    scale: Float[Array, ""],
    batch: Batch,
) -> Float[Array, ""]:
    """The loss, a mean over the examples whose captions have a noun."""
    present = batch["noun_present"]
    weight = batch["weight"] * jnp.any(present, axis=1).astype(jnp.float32)
    negatives = negatives_mask(batch["weight"])
    values = multi_label_info_nce(image, nouns, scale, negatives, present)
    return weighted_mean(values, weight)
