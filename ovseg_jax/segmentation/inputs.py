"""Images that people give: arrays, files, folders, globs, lists on stdin, animations, videos."""

import collections
import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

from ovseg_jax.data.decoding import UnreadableImage, decode, is_foreign, opened, upright
from ovseg_jax.errors import UserError
from ovseg_jax.files import listed

# The bytes are those of an image file.
AnyImage = str | bytes | os.PathLike | Image.Image | np.ndarray | jax.Array

IMAGES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".jp2", ".j2k", ".bmp"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".gif"),
)
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
# Formats whose further frames are pictures too; those of others are previews or depths.
_OF_FRAMES = ("GIF", "PNG", "WEBP", "AVIF", "TIFF")


def read_image(image: AnyImage) -> np.ndarray:
    """An image as uint8 [H, W, 3]: upright, transparent parts white. UserError for a file that
    cannot be read, or an array of another form."""
    try:
        if isinstance(image, bytes):
            return np.asarray(decode(image))
        if isinstance(image, str | os.PathLike):
            return np.asarray(decode(Path(image).read_bytes()))
        if isinstance(image, Image.Image):
            return np.asarray(upright(image))
    except Exception as error:  # decoders raise nearly anything on damaged data
        names = {bytes: "the data", Image.Image: "the PIL image"}
        name = next((name for kind, name in names.items() if isinstance(image, kind)), image)
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name} cannot be read as an image: {reason}") from None
    if not hasattr(image, "__array__"):
        kind = type(image).__name__
        raise UserError(f"an image is a path, bytes of a file, a PIL image or an array, not {kind}")
    array = np.asarray(image)
    gray = array.ndim == 2
    if array.dtype != np.uint8 or not (gray or array.ndim == 3 and array.shape[2] == 3):
        raise UserError(
            f"an image as an array is uint8 [height, width, 3], RGB, 0 to 255; not {array.dtype} "
            f"{list(array.shape)}: np.moveaxis(x, 0, -1) brings channels to the end, x[..., :3] "
            "drops transparency, (255 * x).round().astype('uint8') scales 0 to 1"
        )
    if 0 in array.shape:
        raise UserError(f"an image of {array.shape[0]} x {array.shape[1]} pixels is empty")
    return np.repeat(array[..., None], 3, axis=2) if gray else array


# ---- files and folders


def files_in(folder: Path, suffixes: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """(files whose names end so, in any case; the other files), by name; without those of other
    programs, such as .DS_Store."""
    files = sorted(p for p in folder.iterdir() if not is_foreign(p.name) and p.is_file())
    wanted = [path for path in files if path.suffix.lower() in suffixes]
    return wanted, [path for path in files if path not in set(wanted)]


def find_pictures(given: Sequence[str], stdin: Iterable[str]) -> tuple[list[str], list[str]]:
    """The files that the arguments name, in their order, and the files of folders that are none.

    Arguments are files, folders (without the folders below), globs ("**" goes down), and "-" for
    the lines of `stdin`. What names no image is a UserError.
    """
    entries: list[str] = []
    for argument in given:
        entries += (line.rstrip("\r\n") for line in stdin) if argument == "-" else [argument]
    files: list[str] = []
    passed_over: list[str] = []
    for entry in map(os.path.expanduser, filter(None, entries)):
        if os.path.isdir(entry):
            images, others = files_in(Path(entry), IMAGES + VIDEOS)
            if not images:
                beside = f", but {listed([path.name for path in others])}" if others else ""
                kinds = ", ".join(IMAGES)
                raise UserError(f"folder {entry} holds no image (of {kinds}) or video{beside}")
            files += map(str, images)
            passed_over += map(str, others)
        else:
            files += _named_files(entry)
    if not files:
        raise UserError("--images is empty: name at least one file")
    return list(dict.fromkeys(files)), passed_over  # what is named twice is done once


def _named_files(entry: str) -> list[str]:
    if entry.startswith(("http://", "https://")):
        raise UserError(f"{entry} is an address: download the file, and give its path")
    if os.path.exists(entry):
        return [entry]
    if not any(sign in entry for sign in "*?["):
        raise UserError(f"{entry} does not exist")
    paths = filter(os.path.isfile, glob.glob(entry, recursive=True))
    matches = sorted(path for path in paths if not any(map(is_foreign, Path(path).parts)))
    if not matches:
        raise UserError(f"no file matches {entry}")
    return matches


def result_names(sources: Sequence[str]) -> dict[str, str]:
    """What the results of each source are called: its name without suffix; where several share it,
    with the folder's name before it; where that is no help, the whole path.

    ``a/x.jpg, b/x.jpg, b/y.jpg, b/y.png`` give ``a_x, b_x, b_y_jpg, b_y_png``.
    """
    names: dict[str, str] = {}
    for parts in (1, 2, 0):
        left = {s: _joined_name(s, parts) for s in sources if s not in names}
        counts = collections.Counter((*left.values(), *names.values()))
        names |= {source: name for source, name in left.items() if counts[name] == 1}
    if left := [source for source in sources if source not in names]:
        raise UserError(f"results of {listed(left)} would have the names of others: rename them")
    return {source: names[source] for source in sources}


def _joined_name(source: str, parts: int) -> str:
    """The last parts of a path without suffix, or with 0 all of them and the suffix."""
    path = Path(source)
    folders = [name for name in path.parent.parts if name not in (path.anchor, ".", "..")]
    names = [*folders, path.stem or "image"]
    return "_".join(names[-parts:] if parts else [*names, *filter(None, [path.suffix[1:]])])


# ---- pictures and frames


class Picture(NamedTuple):
    """An image, or why it cannot be read."""

    source: str  # where it is from, for messages
    name: str  # of its results, without suffix
    image: np.ndarray | UserError


def pictures(sources: Sequence[str], every: int = 1) -> Iterator[Picture]:
    """Each image; of videos, animations and files of several pages each `every`-th frame."""
    for source, name in result_names(sources).items():
        try:
            if Path(source).suffix.lower() in VIDEOS:
                frames = _video(source)
            elif _is_animation(source):
                frames = _animation(source)
            else:
                yield Picture(source, name, read_image(source))
                continue
            for number, frame in enumerate(frames):
                if number % every == 0:
                    yield Picture(f"{source}, frame {number}", f"{name}_{number:06d}", frame)
        except UserError as error:
            yield Picture(source, name, error)


def _is_animation(source: str) -> bool:
    try:
        with Image.open(source) as image:
            return image.format in _OF_FRAMES and getattr(image, "n_frames", 1) > 1
    except Exception:
        return False  # `read_image` will say what is wrong


def _animation(source: str) -> Iterator[np.ndarray]:
    try:
        with opened(Path(source).read_bytes()) as image:
            for number in range(image.n_frames):
                image.seek(number)
                yield np.asarray(upright(image.copy()))
    except (OSError, UnreadableImage) as error:
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
