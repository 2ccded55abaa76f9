"""What became of the pairs: counts that add up over shards, the report, and its lines of text."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ovseg_jax.data.manifest import Manifest
from ovseg_jax.data.prepare.entity_choice import EntityChoice
from ovseg_jax.data.prepare.raw_pairs import DROP_REASONS, DUPLICATE
from ovseg_jax.data.prepare.rules import Verdict

# Keys shown for each cause, so that a person can look one up.
_EXAMPLES = 5
_MOST_WORDS = 80  # longer captions are counted here
# Lower ends of the bins of images' shorter sides, in pixels.
_SIDES = (0, 64, 128, 192, 256, 320, 384, 448, 512, 768, 1024, 2048, 4096)
# Pairs of entities listed at most, the most frequent first.
_MOST_PAIRS = 1000
# A source whose shards all count their keys from 0 loses nearly everything to its "duplicates".
_MANY_DUPLICATES = 0.2


@dataclass
class Tally:
    """Counts of pairs: `read` = `kept` + all that was dropped.

    Attributes:
      captions: of the pairs that are kept, the captions that are kept.
      captions_dropped: cause -> captions of kept pairs that are dropped.
      dropped: cause -> pairs.
      examples: cause -> the first keys.
      remarks: what was unusual about pairs that passed the rules (duplicates too) -> pairs.
      damage: what was wrong with whole shards, in words.
    """

    read: int = 0
    kept: int = 0
    captions: int = 0
    captions_dropped: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    remarks: Counter[str] = field(default_factory=Counter)
    damage: list[str] = field(default_factory=list)

    def count(self, key: str, verdict: Verdict) -> None:
        """Counts a pair that was judged."""
        self.read += 1
        if verdict.record is None:
            self._drop(key, verdict.cause)
            return
        self.kept += 1
        self.captions += len(verdict.record.captions)
        self.captions_dropped.update(verdict.dropped)
        self.remarks.update(verdict.remarks)

    def drop_kept(self, key: str, captions: int, cause: str) -> None:
        """Counts a pair as dropped that was counted as kept with so many captions."""
        self.kept -= 1
        self.captions -= captions
        self._drop(key, cause)

    def _drop(self, key: str, cause: str) -> None:
        self.dropped[cause] += 1
        keys = self.examples.setdefault(cause, [])
        if len(keys) < _EXAMPLES:
            keys.append(_printable(key))

    def damaged(self, shard: str, what: str) -> None:
        """Notes what is wrong with a shard."""
        self.damage.append(_printable(f"{shard}: {what}"))

    def add(self, other: "Tally") -> None:
        """Adds the counts of a later shard."""
        self.read += other.read
        self.kept += other.kept
        self.captions += other.captions
        self.captions_dropped.update(other.captions_dropped)
        self.dropped.update(other.dropped)
        self.remarks.update(other.remarks)
        self.damage.extend(other.damage)
        for cause, keys in other.examples.items():
            self.examples[cause] = (self.examples.get(cause, []) + keys)[:_EXAMPLES]

    def to_json(self) -> dict[str, Any]:
        """As plain values, for a file."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Tally":
        """Inverse of `to_json`."""
        counters = ("captions_dropped", "dropped", "remarks")
        return cls(**document | {name: Counter(document[name]) for name in counters})


def _printable(name: str) -> str:
    """A name of a file or pair whose bytes may not be UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


class Statistics:
    """Counts over the records of all shards.

    Attributes:
      together: [e, e] records that name both entities; on the diagonal, those that name one.
      words: captions by number of words.
      sides: records by length of the image's shorter side, in the bins of `_SIDES`.
    """

    def __init__(self, entities: int):
        self.together = np.zeros((entities, entities), np.int64)
        self.words = np.zeros(_MOST_WORDS + 1, np.int64)
        self.sides = np.zeros(len(_SIDES), np.int64)

    def add(
        self, sides: np.ndarray, words: np.ndarray, records: np.ndarray, entities: np.ndarray
    ) -> None:
        """Adds a shard; the arrays are those of `shard.ShardOutput`."""
        named = np.zeros((len(sides), len(self.together)), np.float32)
        named[records, entities] = 1
        # Exact: a shard has far fewer than 2^24 records.
        self.together += np.rint(named.T @ named).astype(np.int64)
        self.words += np.bincount(np.minimum(words, _MOST_WORDS), minlength=len(self.words))
        bins = np.searchsorted(_SIDES, sides, side="right") - 1
        self.sides += np.bincount(bins, minlength=len(_SIDES))


def make_report(
    manifest: Manifest,
    choice: EntityChoice,
    tally: Tally,
    statistics: Statistics,
    rules: Mapping[str, Any],
    input_shards: int,
) -> dict[str, Any]:
    """Everything worth knowing about a preparation. No times and no paths: it can be compared."""
    names, together = list(manifest.entities), statistics.together
    first, second = np.nonzero(np.triu(together, 1))
    order = np.lexsort((second, first, -together[first, second]))[:_MOST_PAIRS]
    pairs = zip(first[order].tolist(), second[order].tolist(), strict=True)
    return {
        "tool": manifest.tool,
        "source": manifest.source,
        "source_fingerprint": manifest.source_fingerprint,
        "input_shards": input_shards,
        "entities_source": choice.source,
        "rules": dict(rules),
        **report_counts(tally),
        "records": {
            "count": manifest.count,
            "shards": len(manifest.shards),
            "bytes": sum(info.bytes for info in manifest.shards),
            "keys_sha256": manifest.keys_sha256,
        },
        "entities": dict(zip(names, together.diagonal().tolist(), strict=True)),
        "together": [(names[a], names[b], int(together[a, b])) for a, b in pairs],
        "caption_words": statistics.words.tolist(),
        "image_sides": dict(zip(map(str, _SIDES), statistics.sides.tolist(), strict=True)),
    }


def report_counts(tally: Tally) -> dict[str, Any]:
    """The fields of a report that say what became of the pairs."""
    dropped = _in_rule_order(tally.dropped)
    duplicates = tally.dropped[DUPLICATE]
    warnings = []
    if duplicates > _MANY_DUPLICATES * (tally.kept + duplicates):
        warnings.append(
            "many keys are duplicates: either the input holds pairs several times, or its keys "
            "are not unique (very old versions of img2dataset number each shard from 0)"
        )
    return {
        "read": tally.read,
        "kept": tally.kept,
        "captions": tally.captions,
        "captions_dropped": _in_rule_order(tally.captions_dropped),
        "dropped": dropped,
        "dropped_examples": {cause: tally.examples[cause] for cause in dropped},
        "remarks": dict(sorted(tally.remarks.items())),
        "damaged_shards": tally.damage,
        "warnings": warnings,
    }


def _in_rule_order(dropped: Counter[str]) -> dict[str, int]:
    return {cause: dropped[cause] for cause in DROP_REASONS if cause in dropped}


def summary(report: Mapping[str, Any]) -> str:
    """A few lines for a terminal."""
    read = max(1, report["read"])
    lines = [f"{report['kept']} of {report['read']} pairs kept ({report['kept'] / read:.1%})"]
    lines += [
        f"  dropped {count:9d} ({count / read:6.1%})  {cause}"
        for cause, count in report["dropped"].items()
    ]
    if report["captions"] != report["kept"] or report["captions_dropped"]:
        lines.append(f"  with {report['captions']} captions")
    lines += [
        f"  dropped {count:9d} of their captions: {cause}"
        for cause, count in report["captions_dropped"].items()
    ]
    lines += [f"  remark  {count:9d}  {remark}" for remark, count in report["remarks"].items()]
    lines += [f"  shard: {what}" for what in report["damaged_shards"][:10]]
    if len(report["damaged_shards"]) > 10:
        lines.append(f"  ... and {len(report['damaged_shards']) - 10} more")
    lines += [f"  warning: {text}" for text in report["warnings"]]
    return "\n".join(lines)
