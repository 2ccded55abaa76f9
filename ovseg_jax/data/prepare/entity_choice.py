"""Which entities captions are searched for: a list, or the captions' own frequent nouns."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ovseg_jax.data.entities import EntitySet, with_names
from ovseg_jax.data.nouns import NounCounts, choose_entities, noun_finder
from ovseg_jax.data.prepare.paths import AnyPath, write_whole
from ovseg_jax.data.prepare.raw_pairs import Damage, InputShard, PairSource, RawPair
from ovseg_jax.data.prepare.rules import Rules, clean_captions
from ovseg_jax.data.scenes import scene_entity_table
from ovseg_jax.errors import UserError


@dataclass(frozen=True)
class EntityChoice:
    """The entities of a preparation.

    Attributes:
      table: the entities (`EntitySet.table`); None where they are still to be built.
      source: where they come from, and how nouns were found where they were.
      top: how many to build.
      counts: mentions of each noun, where nouns were counted.
    """

    table: dict[str, list[str]] | None
    source: str
    top: int = 0
    counts: dict[str, int] | None = None


def parse_choice(text: str) -> EntityChoice:
    """'published', 'scenes', 'auto:N', or a file that `EntitySet.from_json` reads.

    Raises:
      UserError: none of these.
    """
    if text == "published":
        return EntityChoice(EntitySet.published().table, "the published list")
    if text == "scenes":
        return EntityChoice(scene_entity_table(), "the classes of scenes that captions name")
    kind, _, number = text.partition(":")
    if kind == "auto":
        if not number.isdecimal() or not int(number):
            raise UserError(f"--entities={text} must say how many, for example --entities=auto:100")
        source = f"the {number} most frequent nouns of the captions, by {noun_finder().name}"
        return EntityChoice(None, source, int(number))
    if not text.endswith(".json") and not Path(text).is_file():
        raise UserError(
            f"--entities={text} is none of: published, scenes, auto:100, or a .json file of names "
            "and their forms"
        )
    return EntityChoice(EntitySet.from_json(text).table, f"the file {Path(text).name}")


def count_nouns(pairs: Iterable[RawPair | Damage], rules: Rules) -> NounCounts:
    """Counts the nouns of captions that pass the rules."""
    counts, finder = NounCounts(), noun_finder()
    for pair in pairs:
        for caption in [] if isinstance(pair, Damage) else clean_captions(pair, rules):
            counts.add_caption(caption, finder)
    return counts


def write_nouns(source: PairSource, shard: InputShard, path: AnyPath, rules: Rules) -> None:
    """Counts the nouns of one shard's captions into a file, unless it exists."""
    if not path.exists():
        counts = count_nouns(source.read(shard, images=False), rules)
        write_whole(path, json.dumps([counts.uses, counts.evidence]) + "\n")


def read_nouns(paths: Iterable[AnyPath]) -> NounCounts:
    """The sum of the counts in several files."""
    total = NounCounts()
    for path in paths:
        uses, evidence = json.loads(path.read_text("utf-8"))
        total.uses.update(uses)
        total.evidence.update(evidence)
    return total


def build(
    choice: EntityChoice, nouns: NounCounts | None, class_names: Sequence[str]
) -> EntityChoice:
    """A choice with its table, to which class names are added that are no form of an entity in it.

    Args:
      choice: what --entities says.
      nouns: of the captions; needed only where `choice` has no table.
      class_names: of the source.

    Raises:
      UserError: no noun was found.
    """
    source = choice.source + (" and the names of the classes" if class_names else "")
    counts = None if nouns is None else choose_entities(nouns, choice.top)
    table = choice.table if counts is None else {noun: [noun] for noun in counts}
    return replace(choice, table=with_names(table, class_names), source=source, counts=counts)
