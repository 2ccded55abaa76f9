"""What the text encoder reads of one caption: itself, its masked form, prompts (Sec. 3.1.2)."""

import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import TypedDict

import numpy as np
from jaxtyping import Int32, Int64

from ovseg_jax.data.entities import MASK_TOKEN, EntitySet, unmasked
from ovseg_jax.data.templates import SHARED, fill
from ovseg_jax.errors import UserError


def mask_entities(
    caption: str,
    entity_set: EntitySet,
    mask_token: str = MASK_TOKEN,
    only: Collection[int] | None = None,
) -> str:
    """The caption with every entity mention replaced by the mask token.

    Mentions are cut out by position: punctuation and the words around stay as they are. No
    surface form is found in the result.

    Args:
      only: the entities (ids) to mask; all by default.

    Raises:
      UserError: a mask token of the caller's own names an entity.
    """
    if mask_token != MASK_TOKEN and entity_set.find(mask_token):
        raise UserError(f"the mask token {mask_token!r} names an entity; choose another")
    # More than one round where cutting a word out sets another one free for the tokenizer.
    while spans := [
        (start, end)
        for start, end, identity in entity_set.spans(caption)
        if only is None or identity in only
    ]:
        for start, end in reversed(spans):
            caption = caption[:start] + mask_token + caption[end:]
    return caption


def prompt(entities: Sequence[str], template: str) -> str:
    """The template with 'a and b and c' in it; the empty sentence when there is no entity."""
    return fill(template, entities) if entities else ""


def shared_prompt(name: str) -> str:
    """The sentence for an entity that two images share: 'a photo of dog'."""
    return fill(SHARED, [name])


class Texts(TypedDict):
    """The sentences of one caption.

    Keys:
      caption: as found.
      masked: with every entity mention masked.
      prompts: one for each template; empty sentences when the caption names no entity.
      entities: sorted entity ids.
    """

    caption: str
    masked: str
    prompts: list[str]
    entities: tuple[int, ...]


def texts_of(caption: str, entity_set: EntitySet, templates: Sequence[str]) -> Texts:
    """All sentences of a caption. Names stand in a prompt in the order of ids."""
    caption = unmasked(caption)
    entities = entity_set.find(caption)
    names = [entity_set.names[identity] for identity in entities]
    return Texts(
        caption=caption,
        masked=mask_entities(caption, entity_set) if entities else caption,
        prompts=[prompt(names, template) for template in templates],
        entities=entities,
    )


def distinct_captions(
    records: Iterable[Sequence[str]],
) -> tuple[list[str], Int64[np.ndarray, "records_plus_one"], Int32[np.ndarray, "captions"]]:
    """The different captions of many records, and which of them each record has.

    Args:
      records: the captions of each record.

    Returns:
      (captions, starts, rows): record r has `captions[i]` for i in
      `rows[starts[r] : starts[r + 1]]`, in its own order.
    """
    numbers: dict[str, int] = {}
    # Photographs of one class have the same captions, many hundreds of them.
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
    """The different prompts of many captions, and which of them each caption uses.

    Many captions name the same entities, so encoding the distinct sentences costs far less than
    encoding all of them.
    """
    rows: dict[str, int] = {}
    table = np.zeros((len(captions), len(templates)), np.int32)
    for record, caption in enumerate(captions):
        names = [entity_set.names[identity] for identity in entity_set.find(caption)]
        for column, template in enumerate(templates):
            table[record, column] = rows.setdefault(prompt(names, template), len(rows))
    return list(rows), table
