"""The report of a preparation as one HTML page that needs no other file."""

from collections.abc import Mapping
from html import escape
from typing import Any

from ovseg_jax.data.prepare.raw_pairs import DROP_REASONS

_BARS = 100  # entities shown, and pairs of entities, the most frequent ones
_STYLE = """body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse}td,th{padding:.15em .8em .15em 0;text-align:left;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums}h2{margin-top:2em}
.scroll{overflow-x:auto}.bars td{padding:0 .6em 0 0;font-size:12px}
.bars i{display:block;height:13px;background:#3b6ea5}"""


def page(report: Mapping[str, Any]) -> str:
    """HTML of a report (`tally.make_report`)."""
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
