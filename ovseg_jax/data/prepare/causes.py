"""Why a pair is dropped, and what is remarked about one that is kept: names to count by."""

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
# What `augment.decode` says stands behind the colon.
UNREADABLE = "unreadable image: "

# In the order in which the rules are tried: a pair, or a caption of a pair that has others, is
# counted under the first that it breaks. A pair without any good caption counts as its first one.
RULES = {
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

HTML_ESCAPED = "caption: HTML escapes resolved"
SPACES = "caption: blanks and line breaks tidied"
EXIF_ROTATED = "image: turned upright by its EXIF orientation when read"
ANIMATED = "image: animated, first frame used"
TRANSPARENT = "image: transparent, put on white when read"
# Pillow's mode -> remark.
MODES = {
    "1": "image: black and white, becomes RGB",
    "L": "image: gray, becomes RGB",
    "LA": "image: gray, becomes RGB",
    "P": "image: palette, becomes RGB",
    "PA": "image: palette, becomes RGB",
    "CMYK": "image: CMYK, becomes RGB",
    "YCCK": "image: CMYK, becomes RGB",
    "I": "image: 16-bit gray, scaled to 8 bits",
    "I;16": "image: 16-bit gray, scaled to 8 bits",
    "I;16B": "image: 16-bit gray, scaled to 8 bits",
    "F": "image: floating point gray, scaled to 8 bits",
}
