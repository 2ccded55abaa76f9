"""What a source gives: input shards and the pairs in one, before any rule has looked at them."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True)
class InputShard:
    """A part of the input that is read by one call.

    Attributes:
      name: of the shard, as the report shows it.
      start: where it begins: a byte of the file, or the index of a record.
      stop: where it ends; both change when the input does.
      first: number of its first row, where rows are numbered.
    """

    name: str
    start: int
    stop: int
    first: int = 0


@dataclass(frozen=True)
class RawPair:
    """An image with its captions as it was found.

    Attributes:
      key: its name.
      captions: the texts, or their bytes where nothing has decoded them.
      image: the encoded image; None if there is none, or none was asked for.
      cause: why this is no pair at all ('' if it may be one): a name of `causes`.
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
    """A data set to prepare. Is pickled and read in other processes."""

    name: str

    def shards(self) -> list[InputShard]:
        """All input shards in order; the order decides that of the records."""
        ...

    def read(self, shard: InputShard, *, images: bool = True) -> Iterator[RawPair | Damage]:
        """The pairs of a shard in order.

        Args:
          images: False leaves the images out, where that makes reading faster.
        """
        ...


def source_fingerprint(source: PairSource, shards: list[InputShard]) -> str:
    """Changes when the list of shards does, or the size of one."""
    text = json.dumps([source.name, [asdict(shard) for shard in shards]])
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
