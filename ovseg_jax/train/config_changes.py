"""What changed in a config since a checkpoint was written."""

import json
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

_ABSENT = object()


def plain(config: ConfigDict) -> dict[str, Any]:
    """A config as JSON holds it: dicts, lists, strings, numbers."""
    return json.loads(config.to_json_best_effort(sort_keys=True))


def changed_fields(before: Any, now: Any, path: str = "config") -> list[str]:
    """One line for each field that differs: ``config.a.b: 1 -> 2``, sorted by path.

    Args:
      before, now: plain values (`plain`). path: what they are called.
    """
    return list(_changes(before, now, path))


def _changes(before: Any, now: Any, path: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            yield from _changes(before.get(key, _ABSENT), now.get(key, _ABSENT), f"{path}.{key}")
    elif _items(before) and _items(now):
        for index in range(max(len(before), len(now))):
            pair = (item[index] if index < len(item) else _ABSENT for item in (before, now))
            yield from _changes(*pair, f"{path}[{index}]")
    elif before is _ABSENT or now is _ABSENT or before != now:
        yield f"{path}: {_show(before)} -> {_show(now)}"


def _items(value: Any) -> bool:
    """Whether a list holds things with fields of their own, as phases do."""
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


def _show(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value)
