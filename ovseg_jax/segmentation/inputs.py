"""Images that people give: arrays, files, folders, globs, lists on stdin, animations, videos."""

import collections
import glob
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageOps, ImageSequence

from ovseg_jax.data.decoding import UnreadableImage, decode, to_rgb
from ovseg_jax.errors import UserError

# The bytes are those of an image file.
AnyImage = str | bytes | os.PathLike | Image.Image | np.ndarray | jax.Array

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
ANIMATED = (".gif",)
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")


def read_image(image: AnyImage) -> np.ndarray:
    """An image as uint8 [H, W, 3]: upright, transparent parts white.

    Raises:
      UserError: a file that cannot be read, or an array of another form.
    """
    if isinstance(image, Image.Image):
        return np.asarray(to_rgb(ImageOps.exif_transpose(image)))
    if isinstance(image, str | bytes | os.PathLike):
        name = "the data" if isinstance(image, bytes) else image
        try:
            data = image if isinstance(image, bytes) else Path(image).read_bytes()
            return np.asarray(decode(data))
        except OSError as error:
            raise UserError(f"{name} cannot be read: {error.strerror}") from None
        except UnreadableImage as error:
            raise UserError(f"{name} is no image that can be read: {error}") from None
    if not hasattr(image, "__array__"):
        kind = type(image).__name__
        raise UserError(f"an image is a path, bytes of a file, a PIL image or an array, not {kind}")
    array = np.asarray(image)
    gray = array.ndim == 2
    if array.dtype != np.uint8 or not (gray or array.ndim == 3 and array.shape[2] == 3):
        raise UserError(
            f"an image as an array is uint8 [height, width, 3], 0 to 255, RGB; not {array.dtype} "
            f"{list(array.shape)}{_advice(array)}"
        )
    if 0 in array.shape:
        raise UserError(f"an image of {array.shape[0]} x {array.shape[1]} pixels is empty")
    return np.repeat(array[..., None], 3, axis=2) if gray else array


def _advice(array: np.ndarray) -> str:
    """How to make an image of an array, where that is plain."""
    if array.ndim != 3:
        return ""
    if array.shape[2] == 4:
        return (
            ": drop the fourth channel, or give a PIL image, whose transparent parts become white"
        )
    if array.shape[0] == 3 and array.shape[2] != 3:
        return ": the channels come last, as np.moveaxis(x, 0, -1) brings them"
    if np.issubdtype(array.dtype, np.floating):
        return ": for values from 0 to 1, (255 * x).round().astype('uint8')"
    return ""


# ---- the command line


@dataclass(frozen=True)
class Picture:
    """An image that has not been read yet.

    Attributes:
      source: where it is from, for messages.
      name: of its results, without suffix.
      read: gives it as uint8 [H, W, 3], or raises UserError.
    """

    source: str
    name: str
    read: Callable[[], np.ndarray]


def find_pictures(given: Sequence[str], stdin: Iterable[str], every: int = 1) -> list[str]:
    """The files that the arguments name, in their order.

    Args:
      given: files, folders (their images and videos, not those of folders below), globs ("**"
        goes down), and "-" for the lines of `stdin`.
      every: see `pictures`; checked here, before any model is read.

    Raises:
      UserError: nothing is named, a file does not exist, or a folder or a glob has no image.
    """
    if every < 1:
        raise UserError("--every is a number of frames, at least 1")
    entries: list[str] = []
    for argument in given:
        entries += (line.strip() for line in stdin) if argument == "-" else [argument]
    files = [file for entry in entries if entry for file in _expanded(entry)]
    if not files:
        raise UserError("--images is empty: name at least one file")
    return list(dict.fromkeys(files))  # what is named twice is done once


def _expanded(entry: str) -> list[str]:
    if entry.startswith(("http://", "https://")):
        raise UserError(f"{entry} is an address: download the file, and give its path")
    path = Path(entry)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGES + ANIMATED + VIDEOS)
        if not files:
            raise UserError(f"folder {entry} holds no image (of {', '.join(IMAGES)}) or video")
        return [str(p) for p in files]
    if path.exists():
        return [entry]
    if any(sign in entry for sign in "*?["):
        matches = sorted(p for p in glob.glob(entry, recursive=True) if Path(p).is_file())
        if not matches:
            raise UserError(f"no file matches {entry}")
        return matches
    raise UserError(f"{entry} does not exist")


def result_names(sources: Sequence[str]) -> dict[str, str]:
    """What the results of each source are called: its name without suffix, and where several share
    it also as many folders above (and then the suffix) as tell them apart.

    ``a/x.jpg, b/x.jpg, b/y.jpg, b/y.png`` give ``a_x, b_x, b_y_jpg, b_y_png``.

    Raises:
      UserError: that does not tell two of them apart.
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    for depth in itertools.count():
        longer = {source: _longer_name(source, depth) for source in sources}
        counts = collections.Counter(longer.values())
        for source, name in longer.items():
            alone = counts[name] == 1 and name not in taken
            if source not in names and (alone or name == _longer_name(source, depth + 1)):
                names[source] = name
                taken.add(name)
        if len(names) == len(longer):
            break
    writer: dict[str, str] = {}
    for source, name in names.items():
        if writer.setdefault(name, source) != source:
            raise UserError(
                f"{writer[name]} and {source} would both write {name!r}: rename one, or use two "
                "calls with another --out"
            )
    return {source: names[source] for source in sources}


def _longer_name(source: str, depth: int) -> str:
    """The name with `depth` folders above it; where there are fewer, also with its suffix."""
    path = Path(source)
    folders = [part for part in path.parent.parts if part not in (path.anchor, ".", "..")]
    suffix = [path.suffix[1:]] if path.suffix and depth > len(folders) else []
    return "_".join([*folders[max(len(folders) - depth, 0) :], path.stem or "image", *suffix])


def pictures(sources: Sequence[str], every: int = 1) -> Iterator[Picture]:
    """Each image, and of videos and animations each `every`-th frame from the first on.

    A source that cannot be read gives a picture whose `read` raises.
    """
    for source, name in result_names(sources).items():
        suffix = Path(source).suffix.lower()
        if suffix in ANIMATED:
            yield from _frames(source, name, every, _animation)
        elif suffix in VIDEOS:
            yield from _frames(source, name, every, _video)
        else:
            yield Picture(source, name, lambda source=source: read_image(source))


def _frames(
    source: str, name: str, every: int, decode: Callable[[str], Iterator[np.ndarray]]
) -> Iterator[Picture]:
    number = -1
    try:
        for number, frame in enumerate(decode(source)):
            if number % every == 0:
                where = f"{source}, frame {number}"
                yield Picture(where, f"{name}_{number:06d}", lambda frame=frame: frame)
    except UserError as error:
        problem = error  # `error` itself is gone after this block

        def fail() -> np.ndarray:
            raise problem

        yield Picture(source, f"{name}_{number + 1:06d}", fail)


def _animation(source: str) -> Iterator[np.ndarray]:
    try:
        with Image.open(source) as image:
            for frame in ImageSequence.Iterator(image):
                yield read_image(frame.copy())
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{source} cannot be read as an animation ({error})") from None


def _video(source: str) -> Iterator[np.ndarray]:
    try:
        import av
    except ImportError:
        raise UserError("reading videos needs PyAV: pip install 'ovseg_jax[video]'") from None
    try:
        with av.open(source) as container:
            for frame in container.decode(video=0):
                # Phones store upright videos lying, with the angle (counterclockwise) beside.
                turns = round(getattr(frame, "rotation", 0) / 90) % 4
                yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))
    except (OSError, ValueError, IndexError) as error:  # PyAV's errors are kinds of these
        raise UserError(f"{source} cannot be read as a video ({error})") from None
