"""What is masked in a caption, and what is to be found there: the rows of the paper's Table 4."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from jaxtyping import Int32, Integer

from ovseg_jax.data.captions import mask_entities, prompt
from ovseg_jax.data.entities import MASK_TOKEN, EntitySet
from ovseg_jax.data.noun_texts import caption_nouns
from ovseg_jax.data.nouns import NounFinder

NO_TARGET = -1


class Masking(StrEnum):
    """The objective that an image's groups are trained with beside its caption (Sec. 4.3).

    ALL_ENTITIES: every entity is masked; the groups complete the caption to a sentence that names
      them all (Eq. 8, 9).
    SINGLE_ENTITY: the same with one entity of the caption, drawn anew each time.
    ALL_NOUNS: the same with every noun, whether it is an entity or not.
    MULTI_LABEL: nothing is masked; sentences of single nouns are further positives of the image
      (GroupViT, Xu et al., 2022).
    MLM_GROUPS: masked language modeling. Every entity is masked, and each masked token, having
      looked at the groups, is classified: which entity is it?
    MLM: the same from the text encoder's output alone, without the groups.
    """

    ALL_ENTITIES = "all_entities"
    SINGLE_ENTITY = "single_entity"
    ALL_NOUNS = "all_nouns"
    MULTI_LABEL = "multi_label"
    MLM_GROUPS = "mlm_groups"
    MLM = "mlm"

    @property
    def completes(self) -> bool:
        """Whether a masked caption is completed to a prompt, with the decoder."""
        return self in (Masking.ALL_ENTITIES, Masking.SINGLE_ENTITY, Masking.ALL_NOUNS)

    @property
    def classifies(self) -> bool:
        """Whether masked tokens are classified."""
        return self in (Masking.MLM_GROUPS, Masking.MLM)

    @property
    def needs_decoder(self) -> bool:
        """Whether the groups are looked at through the decoder."""
        return self.completes or self is Masking.MLM_GROUPS


@dataclass(frozen=True)
class MaskedTexts:
    """One caption, masked.

    Attributes:
      masked: the caption with mask tokens in it.
      prompt: the sentence that names what was masked, empty where nothing was.
      answer: what was masked, entity ids or nouns: equal answers are no negatives.
      mentions: entity ids in the order of the mask tokens; None where they cannot be told apart
        (the caption brings mask tokens of its own) or are not needed.
    """

    masked: str
    prompt: str
    answer: tuple[int | str, ...]
    mentions: tuple[int, ...] | None = None


def masked_texts(
    caption: str,
    entity_set: EntitySet,
    template: str,
    masking: Masking,
    rng: np.random.Generator,
    finder: NounFinder | None = None,
) -> MaskedTexts:
    """Masks a caption.

    Args:
      template: of the prompt.
      rng: drawn from for SINGLE_ENTITY alone.
      finder: of nouns; the best that is installed by default.
    """
    if masking is Masking.ALL_NOUNS:
        # As a table of its own, so that plurals and every mention are found as entities are.
        entity_set = EntitySet({noun: [] for noun in caption_nouns(caption, finder)})
    found, only = entity_set.find(caption), None
    if masking is Masking.SINGLE_ENTITY and found:
        found = only = (found[int(rng.integers(len(found)))],)
    names = [entity_set.names[identity] for identity in found]
    masked = mask_entities(caption, entity_set, only=only) if found else caption
    return MaskedTexts(
        masked=masked,
        prompt=prompt(names, template),
        answer=tuple(names) if masking is Masking.ALL_NOUNS else found,
        mentions=_mentions(caption, masked, entity_set) if masking.classifies else None,
    )


def _mentions(caption: str, masked: str, entity_set: EntitySet) -> tuple[int, ...] | None:
    mentions = tuple(identity for _, _, identity in entity_set.spans(caption))
    # Another number: the caption holds the literal token, or masking set a further mention free.
    return mentions if masked.count(MASK_TOKEN) == len(mentions) else None


def token_targets(
    ids: Integer[np.ndarray, "M"], mask_id: int, mentions: Sequence[int] | None
) -> Int32[np.ndarray, "M"]:
    """The entity of each mask token, `NO_TARGET` elsewhere.

    Args:
      ids: the masked caption's tokens; where it was cut, its last mentions are missing.
      mentions: from `MaskedTexts`.
    """
    targets = np.full(ids.shape, NO_TARGET, np.int32)
    places = np.flatnonzero(ids == mask_id)
    if mentions is not None and len(places) <= len(mentions):
        targets[places] = np.asarray(mentions, np.int32)[: len(places)]
    return targets
