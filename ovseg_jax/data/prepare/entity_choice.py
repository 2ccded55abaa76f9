"""Which entities captions are searched for: a list, or the captions' own frequent nouns."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ovseg_jax.data.entities import EntitySet, with_names
from ovseg_jax.data.nouns import NounCounts, choose_entities, noun_finder
from ovseg_jax.data.prepare.places import Place
from ovseg_jax.data.prepare.raw import Damage, InputShard, PairSource
from ovseg_jax.data.prepare.rules import Rules, clean_captions
from ovseg_jax.data.prepare.staging import write_whole
from ovseg_jax.data.scenes import scene_entity_table
from ovseg_jax.errors import UserError


@dataclass(frozen=True)
class Entities:
    """The entities of a preparation.

    Attributes:
      source: where they come from, and how nouns were found where they were.
      counts: mentions of each noun, where they were counted.
    """

    table: dict[str, list[str]]
    source: str
    counts: dict[str, int] | None = None


@dataclass(frozen=True)
class EntityChoice:
    """What --entities says.

    Attributes:
      listed: the entities, or None where they are to be built.
      top: how many to build.
      source: as in `Entities`.
    """

    listed: dict[str, list[str]] | None
    top: int
    source: str


def parse_choice(text: str) -> EntityChoice:
    """'published', 'scenes', 'auto:N', or a file that `EntitySet.from_json` reads.

    Raises:
      UserError: none of these.
    """
    if text == "published":
        return EntityChoice(EntitySet.published().table, 0, "the published list")
    if text == "scenes":
        return EntityChoice(scene_entity_table(), 0, "the classes of scenes that captions name")
    kind, _, number = text.partition(":")
    if kind == "auto":
        if not number.isdecimal() or not int(number):
            raise UserError(f"--entities={text} must say how many, for example --entities=auto:100")
        path = noun_finder().name
        return EntityChoice(
            None, int(number), f"the {number} most frequent nouns of the captions, by {path}"
        )
    if not text.endswith(".json") and not Path(text).is_file():
        raise UserError(
            f"--entities={text} is none of: published, scenes, auto:100, or a .json file of names "
            "and their forms"
        )
    return EntityChoice(EntitySet.from_json(text).table, 0, f"the file {Path(text).name}")


def count_nouns(
    source: PairSource, shard: InputShard, number: int, work: Place, rules: Rules
) -> Place:
    """Counts the nouns of one shard's captions into a file; a file that is there is kept."""
    path = work / f"nouns-{number:05d}.json"
    if not path.exists():
        counts = NounCounts()
        finder = noun_finder()
        for pair in source.read(shard, images=False):
            for caption in [] if isinstance(pair, Damage) else clean_captions(pair, rules):
                counts.add_caption(caption, finder)
        write_whole(path, json.dumps([counts.uses, counts.evidence]) + "\n")
    return path


def build(choice: EntityChoice, files: Iterable[Place], names: Sequence[str]) -> Entities:
    """The entities of a choice, and of a set's class names those that are no form of one of them.

    Args:
      files: those that `count_nouns` wrote; read only where entities are to be built.
      names: of classes.

    Raises:
      UserError: no noun was found.
    """
    source = choice.source + (" and the names of the classes" if names else "")
    if choice.listed is not None:
        return Entities(with_names(choice.listed, names), source)
    total = NounCounts()
    for path in files:
        uses, evidence = json.loads(path.read_text("utf-8"))
        total.uses.update(uses)
        total.evidence.update(evidence)
    counts = choose_entities(total, choice.top)
    return Entities(with_names({noun: [noun] for noun in counts}, names), source, counts)
