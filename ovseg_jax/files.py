"""Files that are written whole or not at all, and what is said about many files."""

import os
from collections.abc import Sequence
from pathlib import Path

from ovseg_jax.errors import UserError

_NAMED = 5  # items that a message names before it only counts them
_PROBE = 1 << 16  # bytes: room for a small result


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes a file; a reader finds the old content or the new, and never half of it.

    Raises:
      UserError: it cannot be written.
    """
    # A name of its own length: that of a long file name plus an ending may be too long.
    partial = path.with_name(f".partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None


def check_writable(folder: Path) -> None:
    """Makes the folder, and checks that a file can be written there before any work is done.

    Raises:
      UserError: it cannot be made, is no folder, cannot be written, or its disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        try:
            probe.write_bytes(bytes(_PROBE))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from None


def listed(items: Sequence[object], separator: str = ", ") -> str:
    """The first few items, 'a, b, c and 7 more', for a message."""
    more = f" and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return separator.join(map(str, items[:_NAMED])) + more
