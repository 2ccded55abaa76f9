"""The report of a preparation: counts, a few lines for a terminal, and one HTML page."""

from collections import Counter
from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np

from ovseg_jax.data.prepare.rules import DROP_REASONS, DUPLICATE
from ovseg_jax.data.prepare.shard import Tally
from ovseg_jax.data.records import Manifest

_MOST_WORDS = 80  # longer captions are counted here
# Lower ends of the bins of images' shorter sides, in pixels.
_SIDES = (0, 64, 128, 192, 256, 320, 384, 448, 512, 768, 1024, 2048, 4096)
# Pairs of entities listed at most, the most frequent first.
_MOST_PAIRS = 1000
# A source whose shards all count their keys from 0 loses nearly everything to its "duplicates".
_MANY_DUPLICATES = 0.2
_BARS = 100  # entities shown, and pairs of entities, the most frequent ones
_STYLE = """body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse}td,th{padding:.15em .8em .15em 0;text-align:left;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums}h2{margin-top:2em}
.scroll{overflow-x:auto}.bars td{padding:0 .6em 0 0;font-size:12px}
.bars i{display:block;height:13px;background:#3b6ea5}"""


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
        """Adds a shard; the arrays are those of `shard.ShardOutput.read_facts`."""
        named = np.zeros((len(sides), len(self.together)), np.float32)
        named[records, entities] = 1
        # Exact: a shard has far fewer than 2^24 records.
        self.together += np.rint(named.T @ named).astype(np.int64)
        self.words += np.bincount(np.minimum(words, _MOST_WORDS), minlength=len(self.words))
        bins = np.searchsorted(_SIDES, sides, side="right") - 1
        self.sides += np.bincount(bins, minlength=len(_SIDES))


def make_report(
    manifest: Manifest,
    entities_source: str,
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
        "entities_source": entities_source,
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
    warning = (
        "many keys are duplicates: either the input holds pairs several times, or its keys are not "
        "unique (very old versions of img2dataset number each shard from 0)"
    )
    is_suspect = duplicates > _MANY_DUPLICATES * (tally.kept + duplicates)
    return {
        "read": tally.read,
        "kept": tally.kept,
        "captions": tally.captions,
        "captions_dropped": _in_rule_order(tally.captions_dropped),
        "dropped": dropped,
        "dropped_examples": {cause: tally.examples[cause] for cause in dropped},
        "remarks": dict(sorted(tally.remarks.items())),
        "damaged_shards": tally.damage,
        "warnings": [warning] if is_suspect else [],
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


# ---- the page


def page(report: Mapping[str, Any]) -> str:
    """HTML of a report (`make_report`)."""
    title = f"{report['kept']:,} of {report['read']:,} pairs kept"
    entities = dict(sorted(report["entities"].items(), key=lambda item: (-item[1], item[0])))
    sections = {
        "Dropped, by cause": _dropped(report),
        "Remarks on pairs that passed the rules": _rows(
            [_cells(remark, count) for remark, count in report["remarks"].items()]
        ),
        "Damaged shards": _rows([_cells(line) for line in report["damaged_shards"]]),
        "Records that name each entity": bars(dict(list(entities.items())[:_BARS])),
        "Records that name two entities": bars(
            {f"{first} + {second}": count for first, second, count in report["together"][:_BARS]}
        ),
        "Words in a caption": bars(_words(report["caption_words"])),
        "Shorter side of images, in pixels and more": bars(report["image_sides"]),
    }
    warnings = [f"<p><b>Warning:</b> {escape(text)}</p>" for text in report["warnings"]]
    body = [f"<h1>{title}</h1>", _facts(report), *warnings]
    body += [f'<h2>{name}</h2><div class="scroll">{html}</div>' for name, html in sections.items()]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body>"
        + "\n".join(body)
        + "</body></html>\n"
    )


def bars(values: Mapping[str, int]) -> str:
    """A table with one horizontal bar a name, and its number."""
    most = max(values.values(), default=0) or 1
    rows = [
        f'<tr><td class="n">{escape(name)}</td><td style="width:420px">'
        f'<i style="width:{100 * value / most:.1f}%"></i></td><td class="n">{value:,}</td></tr>'
        for name, value in values.items()
    ]
    return _rows(rows, "bars")


def _facts(report: Mapping[str, Any]) -> str:
    records = report["records"]
    dropped = [f"{cause} {count:,}" for cause, count in report["captions_dropped"].items()]
    others = f"; dropped of kept pairs: {', '.join(dropped)}" if dropped else ""
    facts = {
        "Source": report["source"],
        "Input shards": f"{report['input_shards']:,}",
        "Entities": f"{len(report['entities'])}: {report['entities_source']}",
        "Rules": ", ".join(f"{name} = {value}" for name, value in report["rules"].items()),
        "Records": f"{records['count']:,} in {records['shards']} files, {records['bytes']:,} bytes",
        "Captions": f"{report['captions']:,}{others}",
        "Hash of the key list": records["keys_sha256"],
        "Written by": report["tool"],
    }
    return _rows([_cells(name, text) for name, text in facts.items()])


def _dropped(report: Mapping[str, Any]) -> str:
    dropped = report["dropped"]
    if not dropped:
        return "<p>none</p>"
    rows = [
        _cells(cause, count, DROP_REASONS[cause], ", ".join(report["dropped_examples"][cause]))
        for cause, count in dropped.items()
    ]
    head = "<tr><th>cause</th><th>pairs</th><th>rule</th><th>first keys</th></tr>"
    return bars({"kept": report["kept"], **dropped}) + _rows([head, *rows])


def _words(counts: list[int]) -> dict[str, int]:
    """Number of words -> captions, up to the longest caption."""
    used = max((number for number, count in enumerate(counts) if count), default=0)
    names = [*map(str, range(len(counts) - 1)), f"{len(counts) - 1}+"]
    return dict(zip(names[: used + 1], counts, strict=False))


def _cells(*values: str | int) -> str:
    """A row of a table, with numbers right-aligned."""
    cells = (
        f'<td class="n">{value:,}</td>' if isinstance(value, int) else f"<td>{escape(value)}</td>"
        for value in values
    )
    return f"<tr>{''.join(cells)}</tr>"


def _rows(rows: list[str], kind: str = "facts") -> str:
    return f'<table class="{kind}">{"".join(rows)}</table>' if rows else "<p>none</p>"
