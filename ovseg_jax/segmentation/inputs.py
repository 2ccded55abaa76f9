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
      UserError: nothing is named, a file does not exist, or a folder or a glob has no image.
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
    return list(dict.fromkeys(found))  # what is named twice is done once


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


def result_names(sources: Sequence[str]) -> dict[str, str]:
    """What the results of each source are called: its name without suffix, and for those that share
    it also as many folders above (and then the suffix) as tell them apart.

    ``a/x.jpg, b/x.jpg, b/y.jpg, b/y.png`` give ``a_x, b_x, b_y_jpg, b_y_png``.

    Raises:
      UserError: that does not tell two of them apart.
    """
    parts = {source: _parts(source) for source in sources}
    depths = dict.fromkeys(sources, 0)
    most = max((len(each) for each in parts.values()), default=0)

    def name(source: str) -> str:
        *folders, stem, suffix = parts[source]
        depth = depths[source]
        last = [suffix] if suffix and depth > len(folders) else []
        return "_".join([*folders[max(len(folders) - depth, 0) :], stem, *last])

    for _ in range(most + 1):
        shared: dict[str, list[str]] = {}
        for source in sources:
            shared.setdefault(name(source), []).append(source)
        clashes = [same for same in shared.values() if len(same) > 1]
        if not clashes:
            return {source: name(source) for source in sources}
        for source in (source for same in clashes for source in same):
            depths[source] += 1
    one, other, *_ = clashes[0]
    raise UserError(
        f"{one} and {other} would both write {name(one)!r}: rename one, or use two calls with "
        "another --out"
    )


def _parts(source: str) -> list[str]:
    """Folders, the name without suffix, and the suffix without its dot."""
    if _ADDRESS.match(source):
        source = re.sub(r"[?#].*", "", _ADDRESS.sub("", source)).rstrip("/")
    path = Path(source)
    folders = [part for part in path.parent.parts if part not in (path.anchor, ".", "..")]
    return [*folders, path.stem or "image", path.suffix[1:]]


def pictures(sources: Sequence[str], every: int = 1) -> Iterator[Picture]:
    """Each image, and of videos and animations each `every`-th frame from the first on.

    A source that cannot be read comes as one picture whose `read` raises.
    """
    names = result_names(sources)
    for source, name in names.items():
        suffix = Path(source).suffix.lower()
        if _ADDRESS.match(source):
            yield Picture(source, name, lambda source=source: _downloaded(source))
        elif suffix in (*ANIMATED, *VIDEOS):
            yield from _frames(source, name, every, _animation if suffix in ANIMATED else _video)
        else:
            yield Picture(source, name, lambda source=source: read_image(source))


def _frames(
    source: str, name: str, every: int, decode: Callable[[str], Iterator[np.ndarray]]
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

            yield Picture(source, f"{name}_{number:06d}", fail)
            return
        if number % every == 0:
            yield Picture(
                f"{source}, frame {number}", f"{name}_{number:06d}", lambda frame=frame: frame
            )
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
                # Phones store upright videos lying, with the angle (counterclockwise) beside.
                turns = round(getattr(frame, "rotation", 0) / 90) % 4
                yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))
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
