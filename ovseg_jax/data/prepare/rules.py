"""The rules that a pair must pass: a pure function from a raw pair to a record or a cause."""

import contextlib
import html
import re
import unicodedata
import warnings
from dataclasses import dataclass

from PIL import Image

from ovseg_jax.data.decoding import UnreadableImage, opened, orientation_of, upright
from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.prepare.pairs import RawPair
from ovseg_jax.data.records import Record
from ovseg_jax.errors import UserError

_ESCAPE = re.compile(r"&(#\d+|#[xX][0-9a-fA-F]+|[A-Za-z]\w*);")

# ---- why a pair or a caption is dropped

NOT_DOWNLOADED = "not downloaded"
LOST = "lost with its shard"
BAD_ROW = "unreadable row"
BAD_KEY = "unusable key"
NO_IMAGE_FILE = "no image file"
NO_CLASS = "in no folder of a class"
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
UNREADABLE = "unreadable image: "  # the cause of `decoding.UnreadableImage` follows

# In the order in which the rules are tried. A pair, or a caption of a pair that has others, is
# counted under the first rule that it breaks. A pair without any good caption counts as its first.
DROP_REASONS = {
    NOT_DOWNLOADED: "img2dataset could not download or resize the image",
    LOST: "the shard's parquet file lists the pair, the tar (damaged or cut short) lacks it",
    BAD_ROW: "a row of the table that lacks a column or cannot be parsed",
    BAD_KEY: "the key is empty or not valid Unicode",
    NO_IMAGE_FILE: "a file in the folder of a class that is hidden or, by its ending, no image",
    NO_CLASS: "a file beside the folders of the classes",
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
    UNREADABLE + "unknown range": "gray values of an unknown range, which are never guessed",
    UNREADABLE + "damaged": "the image is cut short or cannot be decoded",
    SMALL_IMAGE: "the shorter side has fewer pixels than --min_side",
    DUPLICATE: "an earlier pair, with nothing wrong with it, has the same key",
}

# ---- what is remarked about a pair that is kept

HTML_ESCAPED = "caption: HTML escapes resolved"
SPACES = "caption: blanks and line breaks tidied"
EXIF_ROTATED = "image: turned upright by its EXIF orientation when read"
ANIMATED = "image: animated, first frame used"
TRANSPARENT = "image: transparent, put on white when read"
# Pillow's mode -> remark.
_MODES = {
    "1": "image: black and white, becomes RGB",
    **dict.fromkeys(("L", "LA"), "image: gray, becomes RGB"),
    **dict.fromkeys(("P", "PA"), "image: palette, becomes RGB"),
    **dict.fromkeys(("CMYK", "YCCK"), "image: CMYK, becomes RGB"),
    **dict.fromkeys(("I", "I;16", "I;16B"), "image: 16-bit gray, scaled to 8 bits"),
    "F": "image: floating point gray, scaled to 8 bits",
}


@dataclass(frozen=True)
class Rules:
    """What can be chosen about the rules."""

    min_side: int = 32  # least pixels of an image's shorter side
    max_caption: int = 2000  # most characters of a caption
    keep_without_entities: bool = False  # keep captions that name no entity (Table 2)

    def __post_init__(self) -> None:
        if self.min_side < 1 or self.max_caption < 1:
            bounds = f"--min_side={self.min_side} and --max_caption={self.max_caption}"
            raise UserError(f"{bounds} must be 1 or more")


@dataclass(frozen=True)
class Verdict:
    """A record to keep, or the cause (of `DROP_REASONS`) why a pair is dropped.

    `remarks` say what is unusual about a pair that is kept; `dropped` are causes of its captions.
    """

    record: Record | None
    cause: str = ""
    remarks: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


class _Dropped(Exception):
    """A pair broke a rule; the argument is the cause."""


def judge(pair: RawPair, rules: Rules, entities: EntitySet) -> Verdict:
    """Applies every rule, the cheap ones first; a pair needs one caption that passes."""
    try:
        if pair.cause:
            raise _Dropped(pair.cause)
        if not pair.key or any("\ud800" <= sign <= "\udfff" for sign in pair.key):
            raise _Dropped(BAD_KEY)  # lone surrogates cannot be stored
        captions, dropped, remarks = _judge_captions(pair, rules, entities)
        if pair.image is None:
            raise _Dropped(NO_IMAGE)
        remarks += _check_image(pair.image, rules)
    except _Dropped as cause:
        return Verdict(None, str(cause))
    named = tuple(sorted(set().union(*captions.values())))
    record = Record(image=pair.image, captions=tuple(captions), key=pair.key, entities=named)
    return Verdict(record, "", tuple(remarks), tuple(dropped))


def _judge_captions(
    pair: RawPair, rules: Rules, entities: EntitySet
) -> tuple[dict[str, tuple[int, ...]], list[str], list[str]]:
    """(caption -> its entities for those that are kept, causes of the others, remarks)."""
    kept: dict[str, tuple[int, ...]] = {}
    dropped, remarks = [], []
    for text in pair.captions:
        try:
            caption, unusual = clean_caption(text, rules)
            named = entities.find(caption)
            if not named and not rules.keep_without_entities:
                raise _Dropped(NO_ENTITY)
            if caption in kept:
                raise _Dropped(REPEATED)
        except _Dropped as cause:
            dropped.append(str(cause))
            continue
        kept[caption] = named
        remarks += unusual
    if not kept:
        raise _Dropped(dropped[0] if dropped else NO_CAPTION)
    return kept, dropped, remarks


def clean_captions(pair: RawPair, rules: Rules) -> list[str]:
    """The captions that pass the rules which need no entities."""
    kept = []
    for text in pair.captions if not pair.cause else ():
        with contextlib.suppress(_Dropped):
            kept.append(clean_caption(text, rules)[0])
    return kept


def clean_caption(text: str | bytes, rules: Rules) -> tuple[str, list[str]]:
    """(caption, remarks): HTML escapes resolved, runs of blanks replaced by one."""
    remarks = []
    try:
        caption = text.decode("utf-8") if isinstance(text, bytes) else text
        caption.encode("utf-8")  # a lone surrogate is a byte that was not UTF-8
    except UnicodeError as error:
        raise _Dropped(NOT_UTF8) from error
    if _ESCAPE.search(caption) and (plain := html.unescape(caption)) != caption:
        caption = plain
        remarks.append(HTML_ESCAPED)
    if (tidy := " ".join(caption.split())) != caption:
        caption = tidy
        remarks.append(SPACES)
    if not caption:
        raise _Dropped(EMPTY_CAPTION)
    if len(caption) > rules.max_caption:
        raise _Dropped(LONG_CAPTION)
    if caption.isascii():
        letters = latin = sum(map(str.isalpha, caption))
    else:
        names = [unicodedata.name(sign, "") for sign in caption if sign.isalpha()]
        letters, latin = len(names), sum(name.startswith("LATIN ") for name in names)
    if not letters:
        raise _Dropped(NO_LETTERS)
    if 2 * latin <= letters:
        raise _Dropped(NON_LATIN)
    return caption, remarks


def _check_image(data: bytes, rules: Rules) -> list[str]:
    """Remarks on an image that training can decode: it is decoded here once."""
    with warnings.catch_warnings():
        # Pillow warns of much that is odd about an image; what matters here is counted.
        warnings.simplefilter("ignore")
        try:
            with opened(data) as image:
                mode = image.mode  # decoding may change it
                size = upright(image).size
                remarks = {
                    _MODES.get(mode, ""): mode in _MODES,
                    EXIF_ROTATED: orientation_of(image) != 1,
                    TRANSPARENT: image.has_transparency_data,
                    ANIMATED: _is_animated(image),
                }
        except UnreadableImage as error:
            raise _Dropped(UNREADABLE + error.cause) from error
    if min(size) < rules.min_side:
        raise _Dropped(SMALL_IMAGE)
    return [remark for remark, applies in remarks.items() if applies]


def _is_animated(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:
        # Frames after the first are damaged: Pillow raises nearly anything. The first is whole.
        return True
