"""Plots as SVG text: bars, columns and a table of colored squares."""

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

Number = int | float
_INK, _PALE, _FILL = "#222", "#777", "#3b6ea5"
_ROW, _LABEL, _WIDTH, _NUMBER = 18, 250, 420, 80
_COLUMNS_HEIGHT = 160


def _svg(width: Number, height: Number, body: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" font-family="sans-serif" font-size="12">'
        + "".join(body)
        + "</svg>"
    )


def _text(x: Number, y: Number, words: str, anchor: str = "start", color: str = _INK) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{color}">{escape(words)}</text>'


def _box(x: Number, y: Number, width: Number, height: Number, color: str, title: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{color}">'
        f"<title>{escape(title)}</title></rect>"
    )


def bars(values: Mapping[str, int]) -> str:
    """One horizontal bar a name, with its number."""
    most = max(values.values(), default=0) or 1
    body = []
    for row, (name, value) in enumerate(values.items()):
        y = row * _ROW
        length = _WIDTH * value / most
        body.append(_text(_LABEL - 8, y + 13, name, "end"))
        body.append(_box(_LABEL, y + 3, length, _ROW - 5, _FILL, f"{name}: {value}"))
        body.append(_text(_LABEL + length + 6, y + 13, f"{value:,}", color=_PALE))
    return _svg(_LABEL + _WIDTH + _NUMBER, max(1, len(values)) * _ROW + 4, body)


def columns(values: Mapping[str, int], unit: str) -> str:
    """One upright bar a bin; every so many bins are labeled."""
    most = max(values.values(), default=0) or 1
    step = max(8.0, min(48.0, 700 / max(1, len(values))))
    every = max(1, round(36 / step))
    body = []
    for number, (name, value) in enumerate(values.items()):
        height = _COLUMNS_HEIGHT * value / most
        x = number * step
        top = _COLUMNS_HEIGHT - height
        body.append(_box(x, top, step - 1, height, _FILL, f"{name} {unit}: {value}"))
        if number % every == 0:
            body.append(_text(x, _COLUMNS_HEIGHT + 14, name, color=_PALE))
    body.append(_text(0, _COLUMNS_HEIGHT + 32, f"{unit}; the highest column: {most:,}"))
    return _svg(max(320, len(values) * step + 60), _COLUMNS_HEIGHT + 40, body)


def squares(names: Sequence[str], counts: Mapping[tuple[str, str], int]) -> str:
    """A square for each pair of names, darker the more often they stand together."""
    side, margin = 14, 110
    most = np.log1p(max(counts.values(), default=0)) or 1.0
    place = {name: number for number, name in enumerate(names)}
    body = [
        _text(margin - 6, margin + number * side + 11, name, "end")
        for name, number in place.items()
    ]
    for name, number in place.items():
        x = margin + number * side + 11
        body.append(f'<g transform="translate({x:g},{margin - 6:g}) rotate(-90)">')
        body.append(_text(0, 0, name) + "</g>")
    for (first, second), count in counts.items():
        if first not in place or second not in place:
            continue
        shade = 235 - int(190 * np.log1p(count) / most)
        color = f"rgb({shade},{shade + 10},245)"
        for row, column in ((first, second), (second, first)):
            x, y = margin + place[column] * side, margin + place[row] * side
            body.append(_box(x, y, side - 1, side - 1, color, f"{first} + {second}: {count}"))
    size = margin + len(names) * side + 4
    return _svg(size, size, body)
