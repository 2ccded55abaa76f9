"""What preparation reads: shards of an input, the pairs in them, files on disk or in buckets.

A path on this machine is a `pathlib.Path`; one in a bucket (gs://, s3://) is an `epath.Path`.
"""

import contextlib
import hashlib
import json
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from etils import epath

from ovseg_jax.errors import UserError

AnyPath = Path | epath.Path
BUCKETS = {"gs://": "gcsfs", "s3://": "s3fs"}  # prefix -> the package that reads such paths


@dataclass(frozen=True)
class InputShard:
    """A section of the input that one call reads, with a name for the report.

    `start` and `stop` are bytes of the file or indices of records, and change when the input does;
    `first` is the number of its first row, where rows are numbered.
    """

    name: str
    start: int
    stop: int
    first: int = 0


@dataclass(frozen=True)
class RawPair:
    """An image with its captions (or their bytes) as the source has them.

    `image` is None if there is none, or none was asked for; `cause` is the drop reason where the
    source itself has no usable pair.
    """

    key: str
    captions: tuple[str | bytes, ...] = ()
    image: bytes | None = None
    cause: str = ""


@dataclass(frozen=True)
class Damage:
    """What is wrong with a shard as a whole, in words for the report."""

    what: str


@runtime_checkable
class PairSource(Protocol):
    """A data set to prepare; it is pickled and read in other processes.

    If its captions are names of classes, a source also has an attribute `class_names`, a list of
    all of them.
    """

    name: str

    def shards(self) -> list[InputShard]:
        """All input shards. Their order decides the order of the records."""
        ...

    def read(self, shard: InputShard, *, images: bool = True) -> Iterator[RawPair | Damage]:
        """The pairs of a shard in order; `images=False` may leave the images out, to be faster."""
        ...


def source_fingerprint(source: PairSource, shards: list[InputShard]) -> str:
    """16 hexadecimal digits that change when the list of shards or the size of a shard does."""
    text = json.dumps([source.name, [asdict(shard) for shard in shards]])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


# ---- paths


def parse_path(text: str | AnyPath) -> AnyPath:
    """The path that a text names; a UserError for a bucket that cannot be reached or read."""
    scheme, mark, _ = str(text).partition("://")
    if not mark:
        return Path(text)
    package = BUCKETS.get(scheme + mark)
    if package is None:
        raise UserError(f"{text} must be a path of this machine, or begin with gs:// or s3://")
    path = epath.Path(text)
    try:
        path.exists()
    except ImportError as error:
        raise UserError(f"{text} needs {package}: pip install {package}") from error
    except Exception as error:  # each kind of bucket has its own errors
        raise UserError(f"{text} cannot be reached: {error}; check path and access") from error
    return path


@contextlib.contextmanager
def network_errors(path: AnyPath, *expected: type[Exception]) -> Iterator[None]:
    """Turns errors in a bucket, other than `expected`, into a UserError.

    A damaged file is a fact of the input; a network that fails is not, and must not drop a shard.
    """
    try:
        yield
    except (UserError, *expected):
        raise
    except Exception as error:
        if isinstance(path, Path):
            raise
        again = "run the same command again, and it goes on where it was"
        raise UserError(f"{path} cannot be read ({error}); {again}") from error


def existing_folder(text: str | AnyPath, flag: str = "source") -> AnyPath:
    """The path of a folder; a UserError names the flag that it is of, if there is none."""
    path = parse_path(text)
    if not path.is_dir():
        raise UserError(f"there is no folder {path}; check --{flag}")
    return path


def read_file(path: AnyPath) -> bytes | None:
    """The content of a file; None if there is none, or a disk of this machine cannot read it."""
    expected = (FileNotFoundError, IsADirectoryError)
    with contextlib.suppress(OSError), network_errors(path, *expected):
        return path.read_bytes()
    return None


def is_file(path: AnyPath) -> bool:
    """Whether there is a file at this path."""
    return path.exists() and not path.is_dir()


def file_size(path: AnyPath) -> int:
    """Bytes of a file."""
    return epath.Path(path).stat().length


def _copy(path: AnyPath, target: AnyPath) -> None:
    with path.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer)


@contextlib.contextmanager
def local_copy(path: AnyPath) -> Iterator[Path]:
    """The path itself on this machine; otherwise a copy, removed when the block ends."""
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        _copy(path, copy)
        yield copy


@contextlib.contextmanager
def whole_file(path: AnyPath, scratch: AnyPath | None = None) -> Iterator[Path]:
    """A local file to write, which becomes `path`, whole, when the block ends without an error.

    A killed run leaves it unfinished in `scratch` on the same disk, by default beside `path`.
    """
    if not isinstance(path, Path):
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / path.name
            yield copy
            _copy(copy, path)  # an object in a bucket appears when all of it has arrived
        return
    # Unique, because several machines may share the folder. NumPy would append a missing ending.
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
    """Removes a folder with everything in it, if there is one."""
    epath.Path(path).rmtree(missing_ok=True)
