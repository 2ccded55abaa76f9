"""What ``predict`` may be given: files, folders, globs, lists on stdin, videos, and addresses."""

import glob
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.loaded import read_image

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
ANIMATED = (".gif",)
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
_ADDRESS = re.compile(r"https?://", re.IGNORECASE)
# Of one download: bytes, and seconds without an answer.
MOST_BYTES, PATIENCE = 64 << 20, 30


@dataclass(frozen=True)
class Picture:
    """One image to come.

    Attributes:
      source: where it is from, for messages. name: of its results, without suffix.
      read: gives it as uint8 [H, W, 3], or raises UserError.
    """

    source: str
    name: str
    read: Callable[[], np.ndarray]


def find_pictures(
    given: Sequence[str], stdin: Iterable[str], *, urls: bool = False, every: int = 1
) -> list[str]:
    """The sources that the arguments stand for, in their order.

    Args:
      given: files, folders (their images and videos, not those of folders below), globs ("**"
        goes down), "-" for the lines of `stdin`, and with `urls` addresses.
      every: see `pictures`; checked here, before any model is read.

    Raises:
      UserError: nothing is named, a file does not exist, a folder or a glob has no image, or two
        sources would give results of one name.
    """
    if every < 1:
        raise UserError("--every is a number of frames, at least 1")
    given = [
        entry
        for argument in given
        for entry in ([line.strip() for line in stdin] if argument == "-" else [argument])
        if entry
    ]
    found: list[str] = []
    for entry in given:
        found += _expanded(entry, urls)
    if not found:
        raise UserError("--images is empty: name at least one file")
    names: dict[str, str] = {}
    for source in found:
        if other := names.get(_name(source)):
            raise UserError(
                f"{other} and {source} would both write {_name(source)!r}: rename one, or use two "
                "calls with another --out"
            )
        names[_name(source)] = source
    return found


def _expanded(entry: str, urls: bool) -> list[str]:
    if _ADDRESS.match(entry):
        if not urls:
            raise UserError(f"{entry} is an address: give --urls to let it be downloaded")
        return [entry]
    path = Path(entry)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGES + ANIMATED + VIDEOS)
        if not found:
            raise UserError(f"folder {entry} holds no image (of {', '.join(IMAGES)}) or video")
        return [str(p) for p in found]
    if path.exists():
        return [entry]
    if any(sign in entry for sign in "*?["):
        matches = sorted(p for p in glob.glob(entry, recursive=True) if Path(p).is_file())
        if not matches:
            raise UserError(f"no file matches {entry}")
        return matches
    raise UserError(f"{entry} does not exist")


def _name(source: str) -> str:
    if _ADDRESS.match(source):
        source = re.sub(r"[?#].*", "", source).rstrip("/")
    return Path(source).stem


def pictures(sources: Sequence[str], every: int = 1) -> Iterator[Picture]:
    """Each image, and of videos and animations each `every`-th frame from the first on.

    A source that cannot be read comes as one picture whose `read` raises.
    """
    for source in sources:
        suffix = Path(source).suffix.lower()
        if _ADDRESS.match(source):
            yield Picture(source, _name(source), lambda source=source: _downloaded(source))
        elif suffix in (*ANIMATED, *VIDEOS):
            yield from _frames(source, every, _animation if suffix in ANIMATED else _video)
        else:
            yield Picture(source, _name(source), lambda source=source: read_image(source))


def _frames(
    source: str, every: int, decode: Callable[[str], Iterator[np.ndarray]]
) -> Iterator[Picture]:
    frames, number = decode(source), 0
    while True:
        try:
            frame = next(frames)
        except StopIteration:
            return
        except UserError as error:
            problem = error  # `error` itself is gone after this block

            def fail(problem: UserError = problem) -> np.ndarray:
                raise problem

            yield Picture(source, f"{_name(source)}_{number:06d}", fail)
            return
        if number % every == 0:
            name = f"{_name(source)}_{number:06d}"
            yield Picture(f"{source}, frame {number}", name, lambda frame=frame: frame)
        number += 1


def _animation(source: str) -> Iterator[np.ndarray]:
    try:
        with Image.open(source) as image:
            for frame in ImageSequence.Iterator(image):
                yield read_image(frame.copy())
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{source} cannot be read as an animation ({error})") from None


def _video(source: str) -> Iterator[np.ndarray]:
    av = _video_library()
    try:
        with av.open(source) as container:
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24")
    except (OSError, ValueError, IndexError) as error:  # PyAV's errors are kinds of these
        raise UserError(f"{source} cannot be read as a video ({error})") from None


def _video_library() -> Any:
    try:
        import av
    except ImportError:
        raise UserError("reading videos needs PyAV: pip install 'ovseg_jax[video]'") from None
    return av


def _downloaded(source: str) -> np.ndarray:
    request = urllib.request.Request(source, headers={"User-Agent": "ovseg_jax"})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            data = answer.read(MOST_BYTES + 1)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise UserError(f"{source} cannot be downloaded ({error})") from None
    if len(data) > MOST_BYTES:
        raise UserError(f"{source} is larger than {MOST_BYTES >> 20} MiB and was not read")
    return read_image(data)
