"""Inputs on this machine or in a bucket: paths such as gs://bucket/cc12m and s3://bucket/cc12m."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from ovseg_jax.errors import UserError

Place = Path | epath.Path
# Prefix -> the package that reads such paths.
BUCKETS = {"gs://": "gcsfs", "s3://": "s3fs"}


def place(path: str | Place) -> Place:
    """The path that a text names.

    Raises:
      UserError: a bucket of another kind, or the package that reads this kind is not installed.
    """
    scheme, mark, _ = str(path).partition("://")
    if not mark:
        return Path(path)
    if scheme + mark not in BUCKETS:
        raise UserError(f"{path} must be a path of this machine, or begin with gs:// or s3://")
    found = epath.Path(path)
    try:
        found.exists()
    except ImportError as error:
        package = BUCKETS[scheme + mark]
        raise UserError(
            f"{path} needs {package}; install it with: pip install {package}"
        ) from error
    except Exception as error:
        # Each kind of bucket has errors of its own for no access, no network, no such bucket.
        raise UserError(f"{path} cannot be reached: {error}; check path and access") from error
    return found


@contextlib.contextmanager
def reached(path: Place, *expected: type[Exception]) -> Iterator[None]:
    """In a bucket, turns what goes wrong on the way there into the end of the run.

    A damaged file is a fact of the input; a network that fails is not, and must not drop a shard.

    Args:
      expected: errors that pass as they are; on this machine all do.

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


def is_file(path: Place) -> bool:
    """Whether there is a file; buckets know no other kind than files and folders."""
    return path.is_file() if isinstance(path, Path) else path.exists() and not path.is_dir()


def size_of(path: Place) -> int:
    """Bytes of a file."""
    return path.stat().st_size if isinstance(path, Path) else path.stat().length


def files_below(folder: Place, ending: str) -> Iterator[tuple[str, Place]]:
    """(path below the folder, path) of the files with an ending, at any depth, unordered.

    In a bucket only two levels are searched: a search at any depth would list all of it.
    """
    if isinstance(folder, Path):
        found = folder.rglob(f"*{ending}")
    else:
        found = (path for depth in ("", "*/") for path in folder.glob(f"{depth}*{ending}"))
    for path in found:
        if is_file(path):
            yield path.relative_to(folder).as_posix(), path
