"""Files that are written whole or not at all, and what is said about many files."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ovseg_jax.errors import UserError

_NAMED = 5  # items that a message names before it only counts them
_PROBE = 1 << 16  # bytes: room for a small result


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes a file, see `replace_files`."""
    replace_files({path: content})


def replace_files(contents: Mapping[Path, str | bytes]) -> None:
    """Writes all files, or none where one cannot be written (UserError). A reader finds the old
    content of a file or the new, and never half of it."""
    partial: dict[Path, Path] = {}
    done: list[Path] = []
    try:
        for number, (path, content) in enumerate(contents.items()):
            path.parent.mkdir(parents=True, exist_ok=True)
            # A name of its own length: that of a long file name plus an ending may be too long.
            partial[path] = path.with_name(f".partial-{os.getpid()}-{number}")
            partial[path].write_bytes(content.encode() if isinstance(content, str) else content)
        for path in contents:
            os.replace(partial[path], path)
            done.append(path)
    except OSError as error:
        for written in done:
            written.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        for rest in partial.values():
            rest.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Makes the folder, and checks before any work is done that a file can be written there;
    UserError where it cannot be made, is no folder, cannot be written, or its disk is full."""
    for path in (folder, *folder.parents):
        if os.path.lexists(path) and not os.path.isdir(path):
            raise UserError(f"{folder} cannot be written: {path} is a file; a folder is needed")
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
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
