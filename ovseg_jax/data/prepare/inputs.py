"""What preparation reads and where: paths, the shards of an input, and the pairs in them.

A path of this machine is a `pathlib.Path`, a path in a bucket (gs://bucket/cc12m, s3://bucket/cc12m)
an `epath.Path`.
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
# Prefix -> the package that reads such paths.
BUCKETS = {"gs://": "gcsfs", "s3://": "s3fs"}


@dataclass(frozen=True)
class InputShard:
    """A section of the input that is read by one call.

    Attributes:
      name: of the shard, as the report shows it.
      start: where it begins: a byte of the file, or the index of a record.
      stop: where it ends. Both change when the input does.
      first: number of its first row, where rows are numbered.
    """

    name: str
    start: int
    stop: int
    first: int = 0


@dataclass(frozen=True)
class RawPair:
    """An image with its captions, as the source has it.

    Attributes:
      key: its name.
      captions: the texts, or their bytes where nothing has decoded them.
      image: the encoded image; None if there is none, or none was asked for.
      cause: the drop reason if the source itself has no usable pair here; '' otherwise.
    """

    key: str
    captions: tuple[str | bytes, ...] = ()
    image: bytes | None = None
    cause: str = ""


@dataclass(frozen=True)
class Damage:
    """Something wrong with a shard as a whole, in words for the report."""

    what: str


@runtime_checkable
class PairSource(Protocol):
    """A data set to prepare. It is pickled and read in other processes.

    A source may also have `class_names() -> list[str]`: then its captions are names of classes.
    """

    name: str

    def shards(self) -> list[InputShard]:
        """All input shards. Their order decides the order of the records."""
        ...

    def read(self, shard: InputShard, *, images: bool = True) -> Iterator[RawPair | Damage]:
        """The pairs of a shard in order.

        Args:
          shard: one of `shards()`.
          images: False leaves the images out, where that makes reading faster.
        """
        ...


def class_names(source: PairSource) -> list[str]:
    """The names of the classes that a source has for captions; none where it has sentences."""
    return source.class_names() if hasattr(source, "class_names") else []


def source_fingerprint(source: PairSource, shards: list[InputShard]) -> str:
    """16 hexadecimal digits that change when the list of shards or the size of a shard does."""
    text = json.dumps([source.name, [asdict(shard) for shard in shards]])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


# ---- paths


def parse_path(text: str | AnyPath) -> AnyPath:
    """The path that a text names.

    Raises:
      UserError: a bucket that cannot be reached, or that no installed package reads.
    """
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
        raise UserError(
            f"{text} needs {package}; install it with: pip install {package}"
        ) from error
    except Exception as error:
        # Each kind of bucket has its own errors for no access, no network, no such bucket.
        raise UserError(f"{text} cannot be reached: {error}; check path and access") from error
    return path


@contextlib.contextmanager
def network_errors(path: AnyPath, *expected: type[Exception]) -> Iterator[None]:
    """Turns errors in a bucket, other than `expected`, into a UserError.

    A damaged file is a fact of the input. A network that fails is not, and must not drop a shard.
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
    """A local file to write, which becomes `path`, whole, when the block ends without an error.

    A killed run leaves the unfinished file in `scratch`, a folder on the same disk; by default the
    folder of `path`.
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
