"""States without their numbers: what a checkpoint has to look like to be read."""

from typing import Any

import jax


def abstract_state(state: Any, shardings: Any) -> Any:
    """Shapes and dtypes of a state (or its `eval_shape`) with where each leaf shall lie."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings,
    )


def misfits(wanted: Any, saved: Any) -> list[str]:
    """One line for each leaf that only one of two states has or whose shapes differ.

    Args:
      wanted, saved: trees of anything with a shape; `saved` may hold dicts and lists where the
        state has classes.
    """
    shapes = [
        {_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (wanted, saved)
    ]
    needed, found = shapes
    return [
        f"{name}: saved {found.get(name, 'not at all')}, needed {needed.get(name, 'no')}"
        for name in sorted(set(needed) | set(found))
        if needed.get(name) != found.get(name)
    ]


def _name(path: tuple[Any, ...]) -> str:
    # A saved tree comes back as dicts and lists: only the words of the path count, not their kind.
    return "/".join(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    )
