"""What a preparation would do, found from a sample: nothing is written."""

import dataclasses
from itertools import islice
from typing import Any

from ovseg_jax.data.entities import EntitySet, with_names
from ovseg_jax.data.nouns import NounCounts, choose_entities, noun_finder
from ovseg_jax.data.prepare.entity_choice import EntityChoice
from ovseg_jax.data.prepare.raw import Damage, InputShard, PairSource
from ovseg_jax.data.prepare.report import counts
from ovseg_jax.data.prepare.rules import Rules, clean_captions, judge
from ovseg_jax.data.prepare.source_folders import class_names
from ovseg_jax.data.prepare.tally import Tally
from ovseg_jax.errors import UserError

PAIRS = 2000
_SHARDS = 8


def dry_run(
    source: PairSource, choice: EntityChoice, rules: Rules, pairs: int = PAIRS
) -> dict[str, Any]:
    """Reads the first pairs of shards spread over the input and applies every rule.

    Entities that are to be built from the captions are built from those of the sample. Duplicates
    are not looked for.

    Args:
      pairs: read at most, over all shards.

    Returns:
      `report.counts`, with `entities`: name -> records of the sample that name it, `bytes` of the
      images that are kept, `shards_read` and `input_shards`.

    Raises:
      UserError: the sample has no pair, or no noun where entities are to be built.
    """
    shards = source.shards()
    chosen = _spread(shards, _SHARDS)
    tally = Tally()
    table = choice.listed
    if table is None:
        table = _nouns(source, chosen, choice.top, rules, pairs)
    entities = EntitySet(with_names(table, class_names(source)))
    named = dict.fromkeys(entities.names, 0)
    size = 0
    for shard in chosen:
        for item in islice(source.read(shard), pairs // len(chosen)):
            if isinstance(item, Damage):
                tally.damaged(shard.name, item.what)
                continue
            verdict = judge(item, rules, entities)
            if verdict.record is None:
                tally.drop(item.key, verdict.cause)
                continue
            record = verdict.record
            tally.keep(len(record.captions), verdict.dropped, verdict.remarks)
            size += len(record.image)
            for entity in record.entities:
                named[entities.names[entity]] += 1
    if not tally.read:
        raise UserError("the sample of the input has no pair; check --source")
    return {
        **counts(tally),
        "rules": dataclasses.asdict(rules),
        "entities": named,
        "bytes": size,
        "shards_read": len(chosen),
        "input_shards": len(shards),
    }


def _spread(shards: list[InputShard], most: int) -> list[InputShard]:
    """Up to so many shards, evenly over the input, the first among them."""
    step = max(1, -(-len(shards) // most))
    return shards[::step]


def _nouns(
    source: PairSource, shards: list[InputShard], top: int, rules: Rules, pairs: int
) -> dict[str, list[str]]:
    found, finder = NounCounts(), noun_finder()
    for shard in shards:
        for item in islice(source.read(shard, images=False), pairs // len(shards)):
            for caption in [] if isinstance(item, Damage) else clean_captions(item, rules):
                found.add_caption(caption, finder)
    return {noun: [noun] for noun in choose_entities(found, top)}
