"""The entity term of Eq. 13, in the forms of the paper's Table 4 (see `data.captions.Masking`)."""

from collections.abc import Mapping

import jax.numpy as jnp
from ml_collections import ConfigDict

from ovseg_jax.data.captions import Masking
from ovseg_jax.errors import UserError
from ovseg_jax.losses.contrastive import false_negative_rate, info_nce, negatives_mask
from ovseg_jax.losses.objective import masked_token_loss, weighted_mean
from ovseg_jax.models.ovsegmentor import unit
from ovseg_jax.shapes import Array, Float, Int
from ovseg_jax.train.batches import Batch, Rows
from ovseg_jax.train.calls import Calls
from ovseg_jax.train.texts import Sentences, embed_sentences


def masking_of(loss: ConfigDict) -> Masking:
    """The objective that ``config.loss`` names.

    Raises:
      UserError: there is no such objective.
    """
    if loss.masking not in list(Masking):
        raise UserError(
            f"config.loss.masking is {loss.masking!r}; it must be one of "
            + ", ".join(repr(one.value) for one in Masking)
        )
    return Masking(loss.masking)


def check_entity_config(config: ConfigDict, mask_id: int, entities: int) -> None:
    """Refuses a config whose entity term cannot be computed.

    Args:
      mask_id: of the tokenizer, -1 where it has no mask token. entities: how many the data have.

    Raises:
      UserError: what the objective needs is missing or contradicts it.
    """
    masking, model = masking_of(config.loss), config.model
    where = f"config.loss.masking = {masking.value!r}"
    if config.loss.entity_weight <= 0:
        if masking is not Masking.ALL_ENTITIES:
            raise UserError(f"{where} has no effect with config.loss.entity_weight = 0")
        return
    if masking.needs_decoder and model.decoder is None:
        raise UserError(
            "config.loss.entity_weight > 0 needs an entity decoder, but config.model.decoder is "
            "None: set config.loss.entity_weight = 0"
        )
    if config.data.cache_texts and masking is not Masking.ALL_ENTITIES:
        raise UserError(
            f"{where} does not fit config.data.cache_texts, which holds captions with all their "
            "entities masked: set cache_texts = False"
        )
    if masking is Masking.MULTI_LABEL and (not config.data.nouns or config.loss.noun_weight):
        raise UserError(
            f"{where} needs nouns (set config.data.nouns, for example to 3), and takes the place "
            "of config.loss.noun_weight (set it to 0)"
        )
    if masking.classifies:
        source = "decoder" if masking is Masking.MLM_GROUPS else "text"
        if (model.token_classes, model.token_classes_from) != (entities, source):
            raise UserError(
                f"{where} classifies {entities} entities: set config.model.token_classes = "
                f"{entities} and config.model.token_classes_from = {source!r}"
            )
        if mask_id < 0:
            raise UserError(f"{where} needs a tokenizer with a mask token")


def completion_rows(
    call: Calls, texts: Mapping[str, Sentences], groups: Float[Array, "B K D"]
) -> Rows:
    """Eq. 8: the completed caption, and the sentence that names what was masked, [B, E] each.

    Args:
      texts: "masked" and "prompt".
    """
    masked = texts["masked"]
    if call.statistics:
        embed_sentences(call, masked)  # for its part in the running statistics
    prompt = unit(embed_sentences(call, texts["prompt"]))
    return {
        "completed": call("complete", masked.tokens, masked.mask, groups, True),
        "prompt": prompt,
    }


def within_set(batch: Batch, config: ConfigDict) -> Int[Array, "B"] | None:
    """The data set of each example where negatives come from the same one, else None."""
    return batch["data_set"] if config.get("negatives_within_set", False) else None


def completion_term(
    rows: Rows, scale: Float[Array, ""], batch: Batch, config: ConfigDict
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Eq. 9 on what `completion_rows` gave.

    Args:
      scale: inverse temperature.
      config: the run's ``config.loss``, which says whether equal answers are no negatives of one
        another (`mask_equal_entities`), nor the answers of equal captions (`mask_equal_captions`).
    """
    weight, sets = batch["weight"] * batch["entity_weight"], batch["entity_set"]
    negatives = negatives_mask(
        weight,
        sets if config.mask_equal_entities else None,
        batch["caption_set"] if config.get("mask_equal_captions", False) else None,
        within=within_set(batch, config),
    )
    values, _ = info_nce(rows["completed"], rows["prompt"], scale, negatives)
    rate = false_negative_rate(weight, sets)
    return weighted_mean(values, weight), {"entity_false_negatives": rate}


def token_rows(
    call: Calls, texts: Mapping[str, Sentences], groups: Float[Array, "B K D"], batch: Batch
) -> Rows:
    """Masked language modeling: the loss of each example, its masked tokens and the right ones."""
    masked, targets = texts["masked"], batch["masked_targets"]
    logits = call("classify_tokens", masked.tokens, masked.mask, groups)
    hidden = targets >= 0
    hits = (logits.argmax(axis=-1) == targets) & hidden
    return {
        "token_loss": masked_token_loss(logits, targets),
        "tokens": hidden.sum(axis=1).astype(jnp.float32),
        "token_hits": hits.sum(axis=1).astype(jnp.float32),
    }


def token_term(rows: Rows, batch: Batch) -> tuple[Float[Array, ""], dict[str, Array]]:
    """A mean over the examples that have a masked token."""
    weight = batch["weight"] * (rows["tokens"] > 0).astype(jnp.float32)
    counted = (weight > 0).astype(jnp.float32)
    tokens = jnp.sum(counted * rows["tokens"])
    accuracy = jnp.sum(counted * rows["token_hits"]) / jnp.maximum(tokens, 1.0)
    return weighted_mean(rows["token_loss"], weight), {"token_accuracy": accuracy}
