"""The report of a preparation as plain values, and in a few lines of text."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from ovseg_jax.data.manifest import Manifest
from ovseg_jax.data.prepare import causes
from ovseg_jax.data.prepare.entity_choice import Entities
from ovseg_jax.data.prepare.statistics import SIDES, Statistics
from ovseg_jax.data.prepare.tally import Tally

# Pairs of entities listed at most, the most frequent first.
_MOST_PAIRS = 1000
# A source whose shards all count their keys from 0 loses nearly everything to its "duplicates".
_MANY_DUPLICATES = 0.2


def make_report(
    manifest: Manifest,
    entities: Entities,
    tally: Tally,
    statistics: Statistics,
    rules: Mapping[str, Any],
    input_shards: int,
) -> dict[str, Any]:
    """Everything worth knowing about a preparation. No times and no paths: it can be compared."""
    return {
        "tool": manifest.tool,
        "source": manifest.source,
        "source_fingerprint": manifest.source_fingerprint,
        "input_shards": input_shards,
        "entities_source": entities.source,
        "rules": dict(rules),
        **counts(tally),
        "records": {
            "count": manifest.count,
            "shards": len(manifest.shards),
            "bytes": sum(info.bytes for info in manifest.shards),
            "keys_sha256": manifest.keys_sha256,
        },
        "entities": dict(zip(entities.table, statistics.entities.tolist(), strict=True)),
        "together": _pairs(list(entities.table), statistics),
        "caption_words": statistics.words.tolist(),
        "image_sides": dict(zip(map(str, SIDES), statistics.sides.tolist(), strict=True)),
    }


def counts(tally: Tally) -> dict[str, Any]:
    """The part of a report that says what became of the pairs."""
    return {
        "read": tally.read,
        "kept": tally.kept,
        "captions": tally.captions,
        "captions_dropped": by_rule(tally.captions_dropped),
        "dropped": by_rule(tally.dropped),
        "dropped_examples": {cause: tally.examples[cause] for cause in by_rule(tally.dropped)},
        "remarks": dict(sorted(tally.remarks.items())),
        "damaged_shards": tally.damage,
        "warnings": _warnings(tally),
    }


def by_rule(dropped: Counter[str]) -> dict[str, int]:
    """The counts in the order of the rules."""
    order = {cause: number for number, cause in enumerate(causes.RULES)}
    return {cause: dropped[cause] for cause in sorted(dropped, key=lambda c: order[c])}


def _warnings(tally: Tally) -> list[str]:
    found = []
    usable = tally.kept + tally.dropped[causes.DUPLICATE]
    if tally.dropped[causes.DUPLICATE] > _MANY_DUPLICATES * usable:
        found.append(
            "many keys are duplicates: either the input holds pairs several times, or its keys "
            "are not unique (very old versions of img2dataset number each shard from 0)"
        )
    return found


def _pairs(names: list[str], statistics: Statistics) -> list[tuple[str, str, int]]:
    """(entity, entity, records that name both) of the most frequent pairs."""
    upper = np.triu(statistics.together, 1)
    first, second = np.nonzero(upper)
    order = np.lexsort((second, first, -upper[first, second]))[:_MOST_PAIRS]
    return [
        (names[a], names[b], int(upper[a, b]))
        for a, b in zip(first[order], second[order], strict=True)
    ]


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
