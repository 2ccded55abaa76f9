"""Files on this machine or in a bucket: gs://bucket/cc12m and s3://bucket/cc12m, through epath.

A path of this machine is a `pathlib.Path`, a path in a bucket an `epath.Path`.
"""

import contextlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from ovseg_jax.errors import UserError

AnyPath = Path | epath.Path
# Prefix -> the package that reads such paths.
BUCKETS = {"gs://": "gcsfs", "s3://": "s3fs"}


def parse_path(text: str | AnyPath) -> AnyPath:
    """The path that a text names.

    Raises:
      UserError: a bucket of another kind, one that cannot be reached, or the package that reads
        this kind is not installed.
    """
    scheme, mark, _ = str(text).partition("://")
    if not mark:
        return Path(text)
    if scheme + mark not in BUCKETS:
        raise UserError(f"{text} must be a path of this machine, or begin with gs:// or s3://")
    path = epath.Path(text)
    try:
        path.exists()
    except ImportError as error:
        package = BUCKETS[scheme + mark]
        raise UserError(
            f"{text} needs {package}; install it with: pip install {package}"
        ) from error
    except Exception as error:
        # Each kind of bucket has its own errors for no access, no network, no such bucket.
        raise UserError(f"{text} cannot be reached: {error}; check path and access") from error
    return path


@contextlib.contextmanager
def network_errors(path: AnyPath, *expected: type[Exception]) -> Iterator[None]:
    """Ends the run when a path in a bucket cannot be read.

    A damaged file is a fact of the input. A network that fails is not, and must not drop a shard.

    Args:
      path: where an error comes from. On this machine, every error passes unchanged.
      expected: errors that pass unchanged in a bucket too.

    Raises:
      UserError: any other error, if the path is in a bucket.
    """
    try:
        yield
    except (UserError, *expected):
        raise
    except Exception as error:
        if isinstance(path, Path):
            raise
        raise UserError(
            f"{path} cannot be read ({error}); run the same command again, and it goes on where "
            "it was"
        ) from error


def is_file(path: AnyPath) -> bool:
    """Whether there is a file at this path."""
    return path.exists() and not path.is_dir()


def file_size(path: AnyPath) -> int:
    """Bytes of a file."""
    return epath.Path(path).stat().length


@contextlib.contextmanager
def local_copy(path: AnyPath) -> Iterator[Path]:
    """The path itself on this machine; otherwise a copy, removed when the block ends."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        with path.open("rb") as source, copy.open("wb") as target:
            shutil.copyfileobj(source, target)
        yield copy


@contextlib.contextmanager
def whole_file(path: AnyPath, scratch: AnyPath | None = None) -> Iterator[Path]:
    """A local file to write, which becomes `path` when the block ends without an error.

    Args:
      path: the file to appear. It is never there in part.
      scratch: the folder for the unfinished file, on the disk of `path`; by default the folder of
        `path`. A killed run leaves the file there. Not used for a bucket.
    """
    if not isinstance(path, Path):
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / path.name
            yield copy
            # An object in a bucket appears when all of it has arrived.
            with copy.open("rb") as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
        return
    # Several machines may share the folder and have processes of equal number. The name keeps its
    # ending: NumPy would append a missing one.
    temporary = Path(scratch or path.parent) / f".{uuid.uuid4().hex}.{path.name}"
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: AnyPath, text: str, scratch: AnyPath | None = None) -> None:
    """Writes a text as UTF-8; see `whole_file`."""
    with whole_file(path, scratch) as file:
        file.write_text(text, "utf-8")


def remove_folder(path: AnyPath) -> None:
    """Removes a folder with everything in it, if it exists."""
    epath.Path(path).rmtree(missing_ok=True)
