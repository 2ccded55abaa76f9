"""Parameter groups by regular expression: first match wins, every parameter is covered.

Paths are "/"-joined, e.g. ``image_encoder/trunk_layers/layers/mlp/fc1/kernel``.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from ovseg_jax.errors import UserError

Flat = dict[str, Any]


def flatten(tree: Mapping[str, Any]) -> Flat:
    """Nested dict to ``{"a/b/c": leaf}``."""
    return flatten_dict(dict(tree), sep="/")


def nest(flat: Flat) -> dict[str, Any]:
    """Inverse of `flatten`."""
    return unflatten_dict(flat, sep="/")


def assign(paths: Sequence[str], rules: Sequence[tuple[str, Any]], field: str) -> Flat:
    """Value of the first rule whose pattern is found in each path (`re.search`).

    Args:
      paths: parameter paths.
      rules: (pattern, value), in order.
      field: name of the config field the rules come from, for messages.

    Raises:
      UserError: a pattern does not compile or matches no parameter that an earlier pattern left,
        or a path is matched by none.
    """
    try:
        compiled = [(re.compile(pattern), value) for pattern, value in rules]
    except re.error as error:
        raise UserError(f"{field}: {error.pattern!r} is no regular expression: {error}") from None
    values: Flat = {}
    used: set[str] = set()
    for path in paths:
        for pattern, value in compiled:
            if pattern.search(path):
                values[path] = value
                used.add(pattern.pattern)
                break
    missed = [path for path in paths if path not in values]
    if missed:
        raise UserError(f"{field}: no pattern matches {', '.join(missed)}; end with a '.*' rule")
    idle = [pattern for pattern, _ in rules if pattern not in used and pattern != ".*"]
    if idle:
        raise UserError(
            f"{field}: {', '.join(map(repr, idle))} matches no parameter that is left for it. "
            f"Parameters look like {paths[0]!r}, {paths[-1]!r}"
        )
    return values


def split(
    params: Mapping[str, Any], frozen: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trainable, frozen) parts of a parameter tree; `join` puts them together again.

    Args:
      frozen: patterns; a parameter that any of them finds is frozen.

    Raises:
      UserError: a pattern matches nothing.
    """
    flat = flatten(params)
    rules = [(pattern, True) for pattern in frozen] + [(".*", False)]
    marks = assign(list(flat), rules, "frozen")
    kept = {path: leaf for path, leaf in flat.items() if not marks[path]}
    held = {path: leaf for path, leaf in flat.items() if marks[path]}
    return nest(kept), nest(held)


def join(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Merges trees with disjoint paths into one."""
    flat: Flat = {}
    for part in parts:
        flat.update(flatten(part))
    return nest(flat)
