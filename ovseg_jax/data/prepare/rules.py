"""The rules that a pair must pass: one pure function from a raw pair to a record or a cause."""

import contextlib
import html
import io
import re
import unicodedata
import warnings
from dataclasses import dataclass

from PIL import Image

from ovseg_jax.data.decoding import MAX_PIXELS, UnreadableImage, decode
from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.prepare import causes
from ovseg_jax.data.prepare.raw import RawPair
from ovseg_jax.data.records import Record
from ovseg_jax.errors import UserError

_ESCAPE = re.compile(r"&(#\d+|#[xX][0-9a-fA-F]+|[A-Za-z]\w*);")
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Rules:
    """What can be chosen about the rules.

    Attributes:
      min_side: the least length of an image's shorter side, in pixels.
      max_caption: the most characters of a caption.
      keep_without_entities: keep captions that name no entity (Table 2: CC12M unfiltered).

    Raises:
      UserError: a bound is below 1.
    """

    min_side: int = 32
    max_caption: int = 2000
    keep_without_entities: bool = False

    def __post_init__(self) -> None:
        if self.min_side < 1 or self.max_caption < 1:
            raise UserError(
                f"--min_side={self.min_side} and --max_caption={self.max_caption} must be 1 or more"
            )


@dataclass(frozen=True)
class Verdict:
    """What became of a pair: a record, or the cause of its being dropped.

    Attributes:
      size: width and height of the image as stored, in pixels.
      remarks: names of `causes` for what is unusual about a pair that is kept.
      dropped: the cause for each caption that is dropped of a pair that is kept.
    """

    record: Record | None
    cause: str = ""
    size: tuple[int, int] = (0, 0)
    remarks: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


class _Dropped(Exception):
    """A pair broke a rule; the argument is the cause."""


def judge(pair: RawPair, rules: Rules, entities: EntitySet) -> Verdict:
    """Applies every rule, the cheap ones first; a pair needs one caption that passes."""
    try:
        if pair.cause:
            raise _Dropped(pair.cause)
        _check_key(pair.key)
        captions, dropped, remarks = _judge_captions(pair, rules, entities)
        if pair.image is None:
            raise _Dropped(causes.NO_IMAGE)
        size, image_remarks = _check_image(pair.image, rules)
    except _Dropped as dropped:
        return Verdict(None, str(dropped))
    named = tuple(sorted(set().union(*captions.values())))
    record = Record(image=pair.image, captions=tuple(captions), key=pair.key, entities=named)
    return Verdict(record, "", size, remarks + image_remarks, dropped)


def _judge_captions(
    pair: RawPair, rules: Rules, entities: EntitySet
) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...], tuple[str, ...]]:
    """(caption -> its entities for those that are kept, causes of the others, remarks)."""
    kept: dict[str, tuple[int, ...]] = {}
    dropped, remarks = [], []
    for found in pair.captions:
        try:
            caption, unusual = clean_caption(found, rules)
            named = entities.find(caption)
            if not named and not rules.keep_without_entities:
                raise _Dropped(causes.NO_ENTITY)
            if caption in kept:
                raise _Dropped(causes.REPEATED)
        except _Dropped as cause:
            dropped.append(str(cause))
            continue
        kept[caption] = named
        remarks += unusual
    if not kept:
        raise _Dropped(dropped[0] if dropped else causes.NO_CAPTION)
    return kept, tuple(dropped), tuple(remarks)


def clean_captions(pair: RawPair, rules: Rules) -> list[str]:
    """The captions that pass the rules which need no entities."""
    kept = []
    for found in pair.captions if not pair.cause else ():
        with contextlib.suppress(_Dropped):
            kept.append(clean_caption(found, rules)[0])
    return kept


def clean_caption(found: str | bytes, rules: Rules) -> tuple[str, tuple[str, ...]]:
    """(caption, remarks); escapes resolved, runs of blanks made one. Nothing else is changed."""
    caption = _decoded(found)
    remarks = []
    if _ESCAPE.search(caption):
        plain = html.unescape(caption)
        if plain != caption:
            caption = plain
            remarks.append(causes.HTML_ESCAPED)
    tidy = " ".join(caption.split())
    if tidy != caption:
        caption = tidy
        remarks.append(causes.SPACES)
    if not caption:
        raise _Dropped(causes.EMPTY_CAPTION)
    if len(caption) > rules.max_caption:
        raise _Dropped(causes.LONG_CAPTION)
    _check_script(caption)
    return caption, tuple(remarks)


def _decoded(found: str | bytes) -> str:
    try:
        if isinstance(found, bytes):
            return found.decode("utf-8")
        found.encode("utf-8")  # a lone surrogate is a byte that was no UTF-8
        return found
    except UnicodeError as error:
        raise _Dropped(causes.NOT_UTF8) from error


def _check_script(caption: str) -> None:
    if caption.isascii():
        letters = latin = sum(map(str.isalpha, caption))
    else:
        names = [unicodedata.name(sign, "") for sign in caption if sign.isalpha()]
        letters, latin = len(names), sum(name.startswith("LATIN ") for name in names)
    if not letters:
        raise _Dropped(causes.NO_LETTERS)
    if 2 * latin <= letters:
        raise _Dropped(causes.NON_LATIN)


def _check_key(key: str) -> None:
    try:
        key.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _Dropped(causes.BAD_KEY) from error
    if not key:
        raise _Dropped(causes.BAD_KEY)


def _check_image(data: bytes, rules: Rules) -> tuple[tuple[int, int], tuple[str, ...]]:
    """(size, remarks) of an image that training can decode: it is decoded here once."""
    with warnings.catch_warnings():
        # Pillow warns of much that is odd about an image; what matters here is counted.
        warnings.simplefilter("ignore")
        try:
            image = decode(data, MAX_PIXELS)
        except UnreadableImage as error:
            raise _Dropped(causes.UNREADABLE + error.cause) from error
        if min(image.size) < rules.min_side:
            raise _Dropped(causes.SMALL_IMAGE)
        # The header once more: `decode` returns pixels alone.
        with Image.open(io.BytesIO(data)) as header:
            return image.size, _image_remarks(header)


def _image_remarks(header: Image.Image) -> tuple[str, ...]:
    remarks = []
    if header.mode in causes.MODES:
        remarks.append(causes.MODES[header.mode])
    if _is_animated(header):
        remarks.append(causes.ANIMATED)
    if header.getexif().get(_EXIF_ORIENTATION, 1) != 1:
        remarks.append(causes.EXIF_ROTATED)
    if header.has_transparency_data:
        remarks.append(causes.TRANSPARENT)
    return tuple(remarks)


def _is_animated(header: Image.Image) -> bool:
    try:
        return bool(getattr(header, "is_animated", False))
    except Exception:
        # Frames after the first are damaged: Pillow raises nearly anything. The first is whole.
        return True
