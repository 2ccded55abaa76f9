"""The report as one HTML page that needs no other file."""

from collections.abc import Mapping
from html import escape
from typing import Any

from ovseg_jax.data.prepare import causes
from ovseg_jax.data.prepare.plots import bars, columns, squares

# Entities in the plots, the most frequent ones.
_BARS, _SQUARES = 100, 40
_STYLE = """body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse}td,th{padding:.15em .8em .15em 0;text-align:left;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums}code{color:#555}h2{margin-top:2em}
.scroll{overflow-x:auto}"""


def page(report: Mapping[str, Any]) -> str:
    """HTML of a report (`report.make_report`)."""
    title = f"{report['kept']:,} of {report['read']:,} pairs kept"
    parts = [
        f"<h1>{title}</h1>",
        _facts(report),
        *(f"<p><b>Warning:</b> {escape(text)}</p>" for text in report["warnings"]),
        "<h2>Dropped, by cause</h2>",
        _dropped(report),
        "<h2>Remarks on pairs that passed the rules</h2>",
        _table([(escape(k), f"{v:,}") for k, v in report["remarks"].items()]),
        "<h2>Damaged shards</h2>",
        _list(report["damaged_shards"]),
        "<h2>Records that name each entity</h2>",
        _scroll(bars(dict(_most_frequent(report["entities"], _BARS)))),
        "<h2>Entities that stand together</h2>",
        "<p>Darker is more often, in logarithms; the number appears under the pointer.</p>",
        _scroll(_together(report)),
        "<h2>Length of captions</h2>",
        _scroll(columns(_words(report["caption_words"]), "words")),
        "<h2>Shorter side of images</h2>",
        _scroll(columns(report["image_sides"], "pixels and more")),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )


def _facts(report: Mapping[str, Any]) -> str:
    records = report["records"]
    facts = {
        "Source": report["source"],
        "Input shards": f"{report['input_shards']:,}",
        "Entities": f"{len(report['entities'])}: {report['entities_source']}",
        "Rules": ", ".join(f"{name} = {value}" for name, value in report["rules"].items()),
        "Records": f"{records['count']:,} in {records['shards']} files, {records['bytes']:,} bytes",
        "Captions": _captions(report),
        "Hash of the key list": records["keys_sha256"],
        "Written by": report["tool"],
    }
    rows = (f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in facts.items())
    return f"<table>{''.join(rows)}</table>"


def _captions(report: Mapping[str, Any]) -> str:
    dropped = [f"{cause} {count:,}" for cause, count in report["captions_dropped"].items()]
    others = f"; dropped of kept pairs: {', '.join(dropped)}" if dropped else ""
    return f"{report['captions']:,}{others}"


def _dropped(report: Mapping[str, Any]) -> str:
    dropped = report["dropped"]
    if not dropped:
        return "<p>none</p>"
    rows = [
        f"<tr><td>{escape(cause)}</td><td class=n>{count:,}</td><td>{escape(_rule(cause))}</td>"
        f"<td><code>{escape(', '.join(report['dropped_examples'][cause]))}</code></td></tr>"
        for cause, count in dropped.items()
    ]
    head = "<tr><th>cause</th><th>pairs</th><th>rule</th><th>first keys</th></tr>"
    table = f"<table>{head}{''.join(rows)}</table>"
    return _scroll(bars({"kept": report["kept"], **dropped})) + _scroll(table)


def _rule(cause: str) -> str:
    return causes.RULES[cause]


def _table(rows: list[tuple[str, str]]) -> str:
    if not rows:
        return "<p>none</p>"
    cells = (f"<tr><td>{name}</td><td class=n>{value}</td></tr>" for name, value in rows)
    return f"<table>{''.join(cells)}</table>"


def _list(lines: list[str]) -> str:
    if not lines:
        return "<p>none</p>"
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _scroll(inner: str) -> str:
    return f'<div class="scroll">{inner}</div>'


def _most_frequent(counts: Mapping[str, int], most: int) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]


def _together(report: Mapping[str, Any]) -> str:
    names = [name for name, _ in _most_frequent(report["entities"], _SQUARES)]
    return squares(names, {(first, second): n for first, second, n in report["together"]})


def _words(counts: list[int]) -> dict[str, int]:
    used = max((number for number, count in enumerate(counts) if count), default=0)
    last = len(counts) - 1
    return {
        f"{number}+" if number == last else str(number): counts[number]
        for number in range(used + 1)
    }
