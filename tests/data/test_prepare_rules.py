"""Every kind of bad image and caption has a rule; none is replaced, repaired or lost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pair_folders import encoded, jpeg, pixels
from PIL import Image

from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.prepare import rules
from ovseg_jax.data.prepare.pairs import RawPair
from ovseg_jax.data.prepare.rules import Rules, clean_caption, clean_captions, judge
from ovseg_jax.errors import UserError

ENTITIES = EntitySet({"dog": [], "cat": []})
GOOD = jpeg()
PICTURE = Image.fromarray(pixels())
GRAY = pixels(channels=1)


def verdict(caption="a dog", image=GOOD, key="k", rules=None, cause=""):
    captions = () if caption is None else (caption,)
    return judge(RawPair(key, captions, image, cause), rules or Rules(), ENTITIES)


def _rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(PICTURE, "JPEG", exif=exif)


def _animated():
    frames = [Image.fromarray(pixels(seed)).convert("P") for seed in range(3)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


DROPPED_IMAGES = {
    "missing": (None, rules.NO_IMAGE),
    "zero-byte": (b"", "unreadable image: empty"),
    "truncated JPEG": (GOOD[: len(GOOD) // 2], "unreadable image: damaged"),
    "truncated PNG": (encoded(PICTURE)[:2000], "unreadable image: damaged"),
    "a web page": (b"<html>404</html>", "unreadable image: not an image"),
    "unknown range": (
        encoded(Image.fromarray(np.full((40, 40), -1, np.float32)), "TIFF"),
        "unreadable image: unknown range",
    ),
    "1x1": (encoded(Image.new("RGB", (1, 1))), rules.SMALL_IMAGE),
    "31 pixels": (encoded(Image.new("RGB", (31, 500))), rules.SMALL_IMAGE),
    "20000x20000": (encoded(Image.new("1", (20_000, 20_000))), "unreadable image: too large"),
}


@pytest.mark.parametrize("kind", DROPPED_IMAGES)
def test_images_that_are_dropped(kind):
    image, cause = DROPPED_IMAGES[kind]
    found = verdict(image=image)
    assert (found.record, found.cause) == (None, cause)
    assert cause in rules.DROP_REASONS


KEPT_IMAGES = {
    "plain": (GOOD, ()),
    "CMYK": (encoded(PICTURE.convert("CMYK"), "JPEG"), ("image: CMYK, becomes RGB",)),
    "palette": (encoded(PICTURE.convert("P")), ("image: palette, becomes RGB",)),
    "gray": (encoded(Image.fromarray(GRAY), "JPEG"), ("image: gray, becomes RGB",)),
    "16-bit": (
        encoded(Image.fromarray(GRAY.astype(np.uint16) * 257)),
        ("image: 16-bit gray, scaled to 8 bits",),
    ),
    "animated": (_animated(), ("image: palette, becomes RGB", rules.ANIMATED)),
    "later frames damaged": (_animated()[:-800], ("image: palette, becomes RGB", rules.ANIMATED)),
    "EXIF-rotated": (_rotated(), (rules.EXIF_ROTATED,)),
    "transparent": (encoded(Image.fromarray(pixels(channels=4))), (rules.TRANSPARENT,)),
    "32 pixels": (encoded(Image.new("RGB", (32, 32))), ()),
}


@pytest.mark.parametrize("kind", KEPT_IMAGES)
def test_images_that_are_kept_as_they_are(kind):
    data, remarks = KEPT_IMAGES[kind]
    found = verdict(image=data)
    assert (found.cause, found.remarks, found.record.image) == ("", remarks, data)


DROPPED_CAPTIONS = {
    "none": (None, rules.NO_CAPTION),
    "empty": ("", rules.EMPTY_CAPTION),
    "blank": (" \t\n\u00a0", rules.EMPTY_CAPTION),
    "escaped blank": ("&nbsp;", rules.EMPTY_CAPTION),
    "Latin-1 bytes": ("a dog in a caf\u00e9".encode("latin-1"), rules.NOT_UTF8),
    "lone surrogate": ("a dog \udce9", rules.NOT_UTF8),
    "10 kB": ("a dog " * 1700, rules.LONG_CAPTION),
    "emoji alone": ("\U0001f415\U0001f415 !", rules.NO_LETTERS),
    "digits": ("2012-05-01 #3", rules.NO_LETTERS),
    "right-to-left": ("\u05db\u05dc\u05d1 \u05d2\u05d3\u05d5\u05dc dog", rules.NON_LATIN),
    "Chinese": ("\u4e00\u53ea\u5927\u72d7\u5728\u516c\u56ed dog", rules.NON_LATIN),
    "Cyrillic": ("\u0441\u043e\u0431\u0430\u043a\u0430", rules.NON_LATIN),
    "no entity": ("a bus and a hot-dog", rules.NO_ENTITY),
}


@pytest.mark.parametrize("kind", DROPPED_CAPTIONS)
def test_captions_that_are_dropped(kind):
    caption, cause = DROPPED_CAPTIONS[kind]
    found = verdict(caption)
    assert (found.record, found.cause) == (None, cause)
    assert cause in rules.DROP_REASONS


KEPT_CAPTIONS = {
    "bytes": (b"a dog", "a dog", ()),
    "accents": ("a dog in a caf\u00e9", "a dog in a caf\u00e9", ()),
    "emoji": ("a dog \U0001f415", "a dog \U0001f415", ()),
    "a word of Hebrew": ("a dog called \u05db\u05dc\u05d1", "a dog called \u05db\u05dc\u05d1", ()),
    "HTML-escaped": ("a dog &amp; a cat&#39;s", "a dog & a cat's", (rules.HTML_ESCAPED,)),
    "no escape": ("a dog & cat; AT&T;", "a dog & cat; AT&T;", ()),
    "line breaks": (" a\ndog\t here ", "a dog here", (rules.SPACES,)),
    "2000 signs": ("a dog " + "x" * 1994, "a dog " + "x" * 1994, ()),
}


@pytest.mark.parametrize("kind", KEPT_CAPTIONS)
def test_captions_that_are_kept(kind):
    caption, expected, remarks = KEPT_CAPTIONS[kind]
    found = verdict(caption)
    assert (found.record.captions, found.remarks) == ((expected,), remarks)
    assert found.record.entities[0] == 0


def test_each_of_several_captions_is_judged():
    captions = ("a dog", "123", "a bus", " a  dog", "a cat", b"\xff")
    pair = RawPair("k", captions, GOOD)
    found = judge(pair, Rules(), ENTITIES)
    assert found.record.captions == ("a dog", "a cat") and found.record.entities == (0, 1)
    letters, repeated = rules.NO_LETTERS, rules.REPEATED
    assert found.dropped == (letters, rules.NO_ENTITY, repeated, rules.NOT_UTF8)
    assert set(found.dropped) < set(rules.DROP_REASONS)
    everything = judge(pair, Rules(keep_without_entities=True), ENTITIES)
    assert everything.record.captions == ("a dog", "a bus", "a cat")
    assert clean_captions(pair, Rules()) == ["a dog", "a bus", "a dog", "a cat"]
    # Without a good one, the pair is counted under the cause of its first.
    assert judge(RawPair("k", captions[1:3], GOOD), Rules(), ENTITIES).cause == letters


def test_causes_of_the_source_keys_and_bounds():
    assert verdict(None, None, cause=rules.LOST).cause == rules.LOST
    assert verdict(key="").cause == verdict(key="a\udce9").cause == rules.BAD_KEY
    assert verdict(rules=Rules(min_side=41)).cause == rules.SMALL_IMAGE
    assert verdict(rules=Rules(max_caption=4)).cause == rules.LONG_CAPTION
    with pytest.raises(UserError, match="--min_side=0"):
        Rules(min_side=0)


@given(st.text(max_size=40))
def test_cleaning_is_settled_after_once(text):
    for caption in clean_captions(RawPair("k", (text,)), Rules()):
        if "&" not in caption:  # "&amp;lt;" is one escape in another
            assert clean_caption(caption, Rules()) == (caption, [])


@given(st.binary(max_size=80), st.binary(max_size=60))
def test_any_bytes_get_a_verdict(caption, image):
    found = verdict(b"dog " + caption, image)
    assert found.record is None
    assert found.cause in rules.DROP_REASONS
