"""The report of a preparation: counts, a few lines for a terminal, and one HTML page."""

from collections import Counter
from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
from jaxtyping import Int64

from ovseg_jax.data.prepare.rules import DROP_REASONS, DUPLICATE
from ovseg_jax.data.prepare.shard import Tally
from ovseg_jax.data.records import Manifest

MOST_WORDS = 80  # longer captions are counted here
_MOST_PAIRS = 1000  # pairs of entities listed at most, the most frequent first
# A source whose shards all count their keys from 0 loses nearly everything to its "duplicates".
_MANY_DUPLICATES = 0.2
_WARNING = (
    "many keys are duplicates: either the input holds pairs several times, or its keys are not "
    "unique (very old versions of img2dataset number each shard from 0)"
)
_BARS = 100  # entities shown, and pairs of entities, the most frequent ones
_STYLE = """body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
td{padding:0 .6em 0 0;font-size:12px}td.n{text-align:right;font-variant-numeric:tabular-nums}
h2{margin-top:2em}pre{white-space:pre-wrap}i{display:block;height:13px;background:#3b6ea5}"""


def make_report(
    manifest: Manifest,
    entities_source: str,
    tally: Tally,
    together: Int64[np.ndarray, "entities entities"],
    words: Int64[np.ndarray, "lengths"],
    rules: Mapping[str, Any],
    input_shards: int,
) -> dict[str, Any]:
    """All about a preparation, without times and paths: two can be compared.

    `together` are the records that name both entities (on the diagonal, those that name one), and
    `words` the captions by number of words.
    """
    names = list(manifest.entities)
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
        "caption_words": words.tolist(),
    }


def report_counts(tally: Tally) -> dict[str, Any]:
    """The fields of a report that say what became of the pairs."""
    dropped = _in_rule_order(tally.dropped)
    duplicates = tally.dropped[DUPLICATE]
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
        "warnings": [_WARNING] if is_suspect else [],
    }


def _in_rule_order(dropped: Counter[str]) -> dict[str, int]:
    return {cause: dropped[cause] for cause in DROP_REASONS if cause in dropped}


def summary(report: Mapping[str, Any]) -> str:
    """A few lines for a terminal."""
    read, damaged = max(1, report["read"]), report["damaged_shards"]
    lines = [f"{report['kept']} of {report['read']} pairs kept ({report['kept'] / read:.1%})"]
    for cause, count in report["dropped"].items():
        lines.append(f"  dropped {count:9d} ({count / read:6.1%})  {cause}")
    if report["captions"] != report["kept"] or report["captions_dropped"]:
        lines.append(f"  with {report['captions']} captions")
    for cause, count in report["captions_dropped"].items():
        lines.append(f"  dropped {count:9d} of their captions: {cause}")
    lines += [f"  remark  {count:9d}  {remark}" for remark, count in report["remarks"].items()]
    lines += [f"  shard: {what}" for what in damaged[:10]]
    lines += [f"  ... and {len(damaged) - 10} more"] if len(damaged) > 10 else []
    return "\n".join(lines + [f"  warning: {text}" for text in report["warnings"]])


# ---- the page


def page(report: Mapping[str, Any]) -> str:
    """HTML of a report (`make_report`)."""
    title = f"{report['kept']:,} of {report['read']:,} pairs kept"
    records, words = report["records"], report["caption_words"]
    rules = ", ".join(f"{name} = {value}" for name, value in report["rules"].items())
    facts = [
        f"source:   {report['source']}, {report['input_shards']:,} input shards",
        f"entities: {len(report['entities'])}, {report['entities_source']}",
        f"rules:    {rules}",
        f"records:  {records['count']:,} in {records['shards']} files, {records['bytes']:,} bytes",
        f"keys:     SHA-256 of the list {records['keys_sha256']}",
        f"written by {report['tool']}",
    ]
    causes = [
        f"{cause}: {DROP_REASONS[cause]}\n    {', '.join(report['dropped_examples'][cause])}"
        for cause in report["dropped"]
    ]
    entities = sorted(report["entities"].items(), key=lambda item: (-item[1], item[0]))
    together = {f"{a} + {b}": count for a, b, count in report["together"][:_BARS]}
    used = max((number for number, count in enumerate(words) if count), default=0)
    names = [*map(str, range(MOST_WORDS)), f"{MOST_WORDS}+"]
    sections = {
        "Counts": _text([summary(report)]),
        "Dropped, by cause": bars({"kept": report["kept"], **report["dropped"]}),
        "Causes, and the first keys of each": _text(causes),
        "Damaged shards": _text(report["damaged_shards"]),
        "Records that name each entity": bars(dict(entities[:_BARS])),
        "Records that name two entities": bars(together),
        "Words in a caption": bars(dict(zip(names[: used + 1], words, strict=False))),
    }
    body = [f"<h1>{title}</h1>", _text(facts)]
    body += [f"<h2>{name}</h2>{html}" for name, html in sections.items()]
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    lines = ["<!DOCTYPE html>", f'<html lang="en"><head>{head}</head>', "<body>", *body]
    return "\n".join([*lines, "</body></html>\n"])


def bars(values: Mapping[str, int]) -> str:
    """A table with one horizontal bar a name, and its number."""
    most = max(values.values(), default=0) or 1
    rows = [
        f'<tr><td class="n">{escape(name)}</td><td style="width:420px">'
        f'<i style="width:{100 * value / most:.1f}%"></i></td><td class="n">{value:,}</td></tr>'
        for name, value in values.items()
    ]
    return f'<table class="bars">{"".join(rows)}</table>' if rows else "<p>none</p>"


def _text(lines: list[str]) -> str:
    return f"<pre>{escape(chr(10).join(lines))}</pre>" if lines else "<p>none</p>"
