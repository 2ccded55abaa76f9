"""What a source gives before any rule has looked at it, and the reasons why a pair is dropped."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Protocol, runtime_checkable

# ---- why a pair or a caption is dropped

NOT_DOWNLOADED = "not downloaded"
LOST = "lost with its shard"
BAD_ROW = "unreadable row"
BAD_KEY = "unusable key"
NO_IMAGE_FILE = "no image file"
NO_CAPTION = "no caption"
EMPTY_CAPTION = "empty caption"
NOT_UTF8 = "caption not UTF-8"
LONG_CAPTION = "caption too long"
NO_LETTERS = "caption without letters"
NON_LATIN = "non-Latin caption"
NO_ENTITY = "no entity"
REPEATED = "repeated caption"
NO_IMAGE = "no image"
SMALL_IMAGE = "image too small"
DUPLICATE = "duplicate key"
# The reason of `decoding.UnreadableImage` follows the colon.
UNREADABLE = "unreadable image: "

# In the order in which the rules are tried. A pair, or a caption of a pair that has others, is
# counted under the first rule that it breaks. A pair without any good caption counts as its first.
DROP_REASONS = {
    NOT_DOWNLOADED: "img2dataset could not download or resize the image",
    LOST: "the shard's parquet file lists the pair, the tar (damaged or cut short) lacks it",
    BAD_ROW: "a row of the table that lacks a column or cannot be parsed",
    BAD_KEY: "the key is empty or not valid Unicode",
    NO_IMAGE_FILE: "a file in the folder of a class that by its ending is no image",
    NO_CAPTION: "there is an image and no text",
    NOT_UTF8: "the caption's bytes are not UTF-8 (never guessed)",
    EMPTY_CAPTION: "the caption is empty or blank",
    LONG_CAPTION: "the caption has more characters than --max_caption",
    NO_LETTERS: "the caption has no letter in it: emoji, digits, punctuation",
    NON_LATIN: "half of the caption's letters or more are not Latin",
    NO_ENTITY: "the caption names no entity (kept with --keep_without_entities)",
    REPEATED: "the same image has the very same caption before",
    NO_IMAGE: "the image file does not exist or cannot be opened",
    UNREADABLE + "empty": "the image has no bytes",
    UNREADABLE + "too large": "the image has more pixels than 2^26; it is never decoded",
    UNREADABLE + "not an image": "no known image format",
    UNREADABLE + "damaged": "the image is cut short or cannot be decoded",
    SMALL_IMAGE: "the shorter side has fewer pixels than --min_side",
    DUPLICATE: "an earlier pair, with nothing wrong with it, has the same key",
}

# ---- what a source gives


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
