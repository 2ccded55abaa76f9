"""Parameter groups by regular expression: first match wins, every parameter is covered.

Paths are "/"-joined, e.g. ``image_encoder/trunk_layers/layers/mlp/fc1/kernel``.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from ovseg_jax.errors import UserError

# Nested dict to ``{"a/b/c": leaf}`` and back.
flatten = partial(flatten_dict, sep="/")
nest = partial(unflatten_dict, sep="/")


def assign(paths: Sequence[str], rules: Sequence[tuple[str, Any]], field: str) -> dict[str, Any]:
    """Value of the first (pattern, value) whose pattern is found in each path (`re.search`).

    Raises:
      UserError: a pattern does not compile or matches no parameter that an earlier pattern left,
        or a path is matched by none. `field` is the config field that the rules come from.
    """
    try:
        compiled = [re.compile(pattern) for pattern, _ in rules]
    except re.error as error:
        raise UserError(f"{field}: {error.pattern!r} is no regular expression: {error}") from None
    first = {
        path: next((i for i, p in enumerate(compiled) if p.search(path)), None) for path in paths
    }
    if missed := [path for path, rule in first.items() if rule is None]:
        raise UserError(f"{field}: no pattern matches {', '.join(missed)}; end with a '.*' rule")
    used = {rules[rule][0] for rule in first.values()}
    if idle := [pattern for pattern, _ in rules if pattern not in used and pattern != ".*"]:
        raise UserError(
            f"{field}: {', '.join(map(repr, idle))} matches no parameter that is left for it. "
            f"Parameters look like {paths[0]!r}, {paths[-1]!r}"
        )
    return {path: rules[rule][1] for path, rule in first.items()}


def split(
    params: Mapping[str, Any], frozen: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trainable, frozen) parts of a parameter tree; `join` puts them together again.

    Raises:
      UserError: one of the patterns `frozen` matches nothing.
    """
    flat = flatten(params)
    marks = assign(list(flat), [*((pattern, True) for pattern in frozen), (".*", False)], "frozen")
    parts = ({p: leaf for p, leaf in flat.items() if marks[p] == held} for held in (False, True))
    trainable, held = map(nest, parts)
    return trainable, held


def join(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Merges trees with disjoint paths into one."""
    return nest({path: leaf for part in parts for path, leaf in flatten(part).items()})
