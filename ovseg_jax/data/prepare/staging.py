"""Files of a preparation, here or in a bucket: read through a local copy, written whole or not."""

import contextlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from ovseg_jax.data.prepare.places import Place


@contextlib.contextmanager
def local(path: Place) -> Iterator[Path]:
    """A file on this machine: the path itself, or a copy from a bucket that is gone afterwards."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        with path.open("rb") as source, copy.open("wb") as target:
            shutil.copyfileobj(source, target)
        yield copy


@contextlib.contextmanager
def whole(path: Place, scratch: Place | None = None) -> Iterator[Path]:
    """A local file to write, which becomes `path` when the block ends without an error.

    Args:
      scratch: the folder for it while it is written, on the disk of `path`; by default that of
        `path`. A killed run leaves it behind there. In a bucket it plays no part.
    """
    if not isinstance(path, Path):
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / path.name
            yield copy
            # An object of a bucket appears when all of it is there.
            with copy.open("rb") as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
        return
    # Several machines may share the folder, and count their processes alike. NumPy would append an
    # ending that is not there.
    temporary = Path(scratch or path.parent) / f".{uuid.uuid4().hex}.{path.name}"
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Place, content: str | bytes, scratch: Place | None = None) -> None:
    """Writes text (as UTF-8) or bytes; see `whole`."""
    with whole(path, scratch) as file:
        file.write_bytes(content.encode() if isinstance(content, str) else content)


def remove_folder(path: Place) -> None:
    """Removes a folder with everything in it, if it is there."""
    if isinstance(path, Path):
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.rmtree()
