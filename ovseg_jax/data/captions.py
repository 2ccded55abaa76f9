"""What the text encoder reads of a caption: itself, its masked form, prompts (Sec. 3.1.2)."""

import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from jaxtyping import Int32, Int64, Integer

from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.tokenizer import MASK_TOKEN, fill
from ovseg_jax.data.words import caption_nouns

# The target of a masked token that is no entity.
NO_TARGET = -1


def prompt(entities: Sequence[str], template: str) -> str:
    """The template with the entities in it; the empty sentence where there is no entity."""
    return fill(template, entities) if entities else ""


def shared_prompt(name: str) -> str:
    """The sentence for an entity that two images share (Sec. 3.2.3): 'a photo of dog'."""
    return fill("a photo of {}", [name])


def mask_entities(caption: str, entity_set: EntitySet, only: Collection[int] | None = None) -> str:
    """The caption with the mask token in place of every mention of an entity (of those in `only`).

    The text around the mentions does not change. The result names no such entity.
    """
    # Several rounds, because the words on both sides of a mask may become another mention.
    while spans := [
        (start, end)
        for start, end, identity in entity_set.spans(caption)
        if only is None or identity in only
    ]:
        for start, end in reversed(spans):
            caption = caption[:start] + MASK_TOKEN + caption[end:]
    return caption


class Masking(StrEnum):
    """The objective for an image's groups besides the caption's (Sec. 4.3, Table 4).

    ALL_ENTITIES: every entity is masked; the groups complete the caption to a sentence that names
      them all (Eq. 8, 9).
    SINGLE_ENTITY: the same with one entity of the caption, drawn anew each time.
    ALL_NOUNS: the same with every noun, whether it is an entity or not.
    MULTI_LABEL: nothing is masked; sentences of single nouns are further positives of the image
      (GroupViT, Xu et al., 2022).
    MLM_GROUPS: every entity is masked; each masked token attends to the groups and is classified
      as an entity.
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
        """Whether the decoder completes a masked caption to a prompt."""
        return self in (Masking.ALL_ENTITIES, Masking.SINGLE_ENTITY, Masking.ALL_NOUNS)

    @property
    def classifies(self) -> bool:
        """Whether masked tokens are classified."""
        return self in (Masking.MLM_GROUPS, Masking.MLM)

    @property
    def needs_decoder(self) -> bool:
        """Whether the decoder reads the groups."""
        return self.completes or self is Masking.MLM_GROUPS


@dataclass(frozen=True)
class MaskedTexts:
    """A caption, masked.

    Attributes:
      masked: the caption with mask tokens in it.
      prompt: the sentence that names what was masked, empty where nothing was.
      answer: what was masked, entity ids or nouns: equal answers are no negatives.
      mentions: entity ids in the order of the mask tokens; None where they are not needed, or
        unknown because the caption has mask tokens of its own.
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
) -> MaskedTexts:
    """Masks a caption; only SINGLE_ENTITY draws. In the prompt, names are in order of id."""
    if masking is Masking.ALL_NOUNS:
        # A table of the nouns, so that every mention and plural is masked.
        entity_set = EntitySet({noun: [] for noun in caption_nouns(caption)})
    named, only = entity_set.find(caption), None
    if masking is Masking.SINGLE_ENTITY and named:
        named = only = (named[int(rng.integers(len(named)))],)
    names = [entity_set.names[identity] for identity in named]
    masked = mask_entities(caption, entity_set, only) if named else caption
    mentions = None
    if masking.classifies:
        mentions = tuple(identity for _, _, identity in entity_set.spans(caption))
        # The counts differ if the caption has the literal token, or masking made another mention.
        mentions = mentions if masked.count(MASK_TOKEN) == len(mentions) else None
    answer = tuple(names) if masking is Masking.ALL_NOUNS else named
    return MaskedTexts(masked, prompt(names, template), answer, mentions)


def token_targets(
    ids: Integer[np.ndarray, "M"], mask_id: int, mentions: Sequence[int] | None
) -> Int32[np.ndarray, "M"]:
    """The entity of each mask token, `NO_TARGET` elsewhere.

    `mentions` are those of `MaskedTexts`; if the caption was cut, `ids` lack the last of them.
    """
    targets = np.full(ids.shape, NO_TARGET, np.int32)
    at = np.flatnonzero(ids == mask_id)
    if mentions is not None and len(at) <= len(mentions):
        targets[at] = np.asarray(mentions, np.int32)[: len(at)]
    return targets


def noun_sentences(
    caption: str,
    count: int,
    templates: Sequence[str],
    rng: np.random.Generator,
) -> list[str]:
    """Up to `count` nouns of a caption, drawn at random, each in a random template (GroupViT)."""
    nouns = caption_nouns(caption)
    drawn = rng.permutation(len(nouns))[:count]
    return [fill(templates[int(rng.integers(len(templates)))], [nouns[i]]) for i in drawn]


def distinct_captions(
    records: Iterable[Sequence[str]],
) -> tuple[list[str], Int64[np.ndarray, "records_plus_one"], Int32[np.ndarray, "captions"]]:
    """(captions, starts, rows): the different captions of many records, and who has which.

    Record r has `captions[i]` for i in `rows[starts[r] : starts[r + 1]]`, in their order.
    """
    numbers: dict[str, int] = {}
    # Photographs of a class share hundreds of captions.
    known: dict[Sequence[str], list[int]] = {}
    rows = []
    for captions in records:
        if captions not in known:
            known[captions] = [numbers.setdefault(text, len(numbers)) for text in captions]
        rows.append(known[captions])
    starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    flat = np.fromiter(itertools.chain.from_iterable(rows), np.int32, int(starts[-1]))
    return list(numbers), starts, flat


def distinct_prompts(
    captions: Sequence[str], entity_set: EntitySet, templates: Sequence[str]
) -> tuple[list[str], Int32[np.ndarray, "records templates"]]:
    """The different prompts of many captions, far fewer, and which of them each caption uses."""
    rows: dict[str, int] = {}
    table = np.zeros((len(captions), len(templates)), np.int32)
    for record, caption in enumerate(captions):
        names = [entity_set.names[identity] for identity in entity_set.find(caption)]
        for column, template in enumerate(templates):
            table[record, column] = rows.setdefault(prompt(names, template), len(rows))
    return list(rows), table
