"""Segment your own images with your own words.

``python -m ovseg_jax.predict --images=a.jpg,b.png --classes="cat,dog" --out=DIR``
"""

import collections
import glob
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer
from PIL import Image
from tqdm import tqdm

import ovseg_jax
from ovseg_jax import flags
from ovseg_jax.data.decoding import IMAGES, UnreadableImage, is_foreign, opened, upright
from ovseg_jax.errors import UserError
from ovseg_jax.files import check_writable, listed, replace_files
from ovseg_jax.platforms import enable_compilation_cache
from ovseg_jax.segmentation.api import Segmentation
from ovseg_jax.segmentation.pictures import (
    files_in,
    overlay,
    palette_image,
    png,
    read_image,
)
from ovseg_jax.segmentation.vocabulary import Vocabulary, read_words, split_at_commas, word_list

# Formats of results: how their files end, and what they are.
FORMATS = {
    "png": ("mask.png", "palette image, 0 background, then the classes in order"),
    "overlay": ("overlay.png", "the image, tinted, with the names on it and a legend"),
    "json": ("json", "area and score of each class"),
    "npz": ("npz", "labels, groups, scores, classes, for NumPy"),
    "rle": ("rle.json", "run lengths of each class, as COCO's results have them"),
}
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
# Image formats whose further frames are pictures too; those of others are previews or depths.
_OF_FRAMES = ("GIF", "PNG", "WEBP", "AVIF", "TIFF")
# What is meant as a number or a switch, and not as a word for the background.
_NO_WORD = re.compile(r"[^\w\s]*[\d\u00bc-\u00be]|(none|off|on|true|false|yes|no|null)$", re.I)
# By this we know our own files.
_MARK = "written by ovseg_jax.predict"

_LISTED = "\n         ".join(f"NAME.{suffix}: {what}" for suffix, what in FORMATS.values())
ABOUT = f"""Segment images into classes that you name.

    python -m ovseg_jax.predict --images=holiday/ --classes="cat|kitten,dog"
    find . -name '*.jpg' | python -m ovseg_jax.predict --model=DIR --images=- --vocabulary=coco

Formats: {_LISTED}

With few classes, everyday words compete too, so that a single class does not take every pixel; what
they win becomes background. A comma in a name is written \\,. An image that fails is reported and
the others are still done; the exit code is then 1.
"""

FLAGS = (
    flags.Flag("model", default="photos", help="model directory, or the name of a shipped model"),
    flags.Flag(
        "images", required=True, help="files, folders, globs, videos, or - for stdin's list"
    ),
    flags.Flag("classes", help="class names, comma-separated; synonyms as cat|kitten"),
    flags.Flag("vocabulary", help="a list of classes: voc, coco, ade20k, ..., or a text file"),
    flags.Flag("background", help="a threshold from 0 to 1, 'none', or words that stand for it"),
    flags.Flag("out", default="predictions", help="folder for the results"),
    flags.Flag("overwrite", bool, default=False, help="replace results of an earlier call"),
    flags.Flag("formats", flags.comma_list, default=["png", "overlay", "json"], help="see above"),
    flags.Flag("words", int, default=0, help="total of competing words; 0: as in calibration"),
    flags.Flag("batch_size", int, default=0, help="windows encoded at once; 0 to choose"),
    flags.Flag("every", int, default=1, help="take every N-th frame of videos"),
    flags.Flag("pamr", int, default=0, help="rounds of refinement by the image's colors"),
)


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code."""
    args = flags.parse(argv, FLAGS, ABOUT)
    if (args.classes is None) == (args.vocabulary is None):
        raise UserError("give exactly one of --classes and --vocabulary")
    if args.vocabulary:
        classes = word_list(args.vocabulary)
    else:
        classes, _ = read_words(args.classes, "--classes")
    background = _background(args.background)
    words = background["background"]
    vocabulary = Vocabulary.of(classes, words if isinstance(words, list) else ())
    unknown = ", ".join(name for name in args.formats if name not in FORMATS)
    if unknown or not args.formats:
        wrong = f"there is no format {unknown}" if unknown else "no format is named"
        raise UserError(f"--formats: {wrong}; the formats are {', '.join(FORMATS)}")
    if len(vocabulary.classes) > 255 and {"png", "overlay"} & set(args.formats):
        hint = "a palette image has room for 255: use --formats=npz,rle,json"
        raise UserError(f"{len(vocabulary.classes)} classes do not fit; {hint}")
    for name, least in (("words", 0), ("batch_size", 0), ("every", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name}={getattr(args, name)} must be at least {least}")
    # A file whose name has a comma is itself.
    given = [args.images] if os.path.exists(args.images) else split_at_commas(args.images)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # names of files need not be text
    sources, passed_over = find_pictures(given, sys.stdin)
    if passed_over:
        _say(f"passed over, as no image: {listed(passed_over)}", sys.stderr)
    out = Path(args.out).expanduser()
    check_writable(out)
    for name, kind in itertools.product(result_names(sources).values(), args.formats):
        _check_free(out / f"{name}.{FORMATS[kind][0]}", args.overwrite)
    enable_compilation_cache()
    settings = {"pamr_steps": args.pamr} if args.pamr else {}
    model = ovseg_jax.load(os.path.expanduser(args.model), **settings)
    options = background | {"words": args.words, "batch_size": args.batch_size}
    return _segment(model, sources, classes, options, args, out)


def _segment(
    model: Any, sources: list[str], classes: Any, options: dict, args: SimpleNamespace, out: Path
) -> int:
    """Segments every image that can be read; 1 if any failed."""
    written: dict[str, str] = {}  # the image of each result
    waiting: dict[int, Picture] = {}  # by its number among the images that could be read
    found: list[bool] = []  # of each image that is done, whether anything was found in it
    failed: list[str] = []
    bar = tqdm(total=len(sources), unit=" images", disable=None)

    def fail(reason: str) -> None:
        failed.append(reason)
        _say(f"error: {reason}", sys.stderr)
        bar.update()

    def readable() -> Iterator[np.ndarray]:
        for picture in pictures(sources, args.every):
            if isinstance(picture.image, UserError):
                fail(str(picture.image))
            elif other := written.get(picture.name):
                fail(f"{picture.source} would overwrite the result of {other}: rename one")
            else:
                waiting[len(written)] = picture
                written[picture.name] = picture.source
                yield picture.image

    with bar:
        for index, result in model.segment_each(readable(), classes, **options):
            picture = waiting.pop(index)
            try:
                first = write_results(out, picture, result, args)
            except UserError as error:
                fail(f"{picture.source}: {error}")
                continue
            found.append(bool(result.labels.any()))
            _say(f"{picture.source}: {summary(result)} -> {first}", sys.stdout)
            bar.total = max(bar.total, len(found) + len(failed))  # a video has many images
            bar.update()
    if not all(found):
        _say(
            f"nothing was found in {found.count(False)} of {len(found)} images. --words=N lets N "
            "words compete (fewer find more), --background=0 or none asks for less certainty or "
            "for none",
            sys.stderr,
        )
    if failed:
        _say(f"{len(failed)} of {len(found) + len(failed)} images failed", sys.stderr)
    return 1 if failed else 0


def _say(text: str, file: Any) -> None:
    """Writes a line above the progress bar, at once even into a pipe; what a terminal cannot show,
    such as bytes of a name that are no text, is escaped."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    encoding = getattr(file, "encoding", None) or "utf-8"
    tqdm.write(text.encode(encoding, "backslashreplace").decode(encoding), file=file)
    file.flush()


def _background(text: str | None) -> dict[str, Any]:
    """The arguments of `segment` for a value of --background."""
    if text is None or text.strip().lower() == "none":
        return {"background": text is None}
    try:
        threshold = float(text.replace("_", "no digit"))
    except ValueError:
        words = [word for word in split_at_commas(text) if word]
        if not words:
            raise UserError("--background is a threshold, 'none', or words") from None
        if wrong := [word for word in words if _NO_WORD.match(word)]:
            hint = f"{wrong[0]!r} is no word; a threshold is written as 0.5, and none stands alone"
            raise UserError(f"--background={text}: {hint}") from None
        return {"background": words}
    if not 0 <= threshold <= 1:
        raise UserError(f"--background={text}: a threshold is a probability, from 0 to 1")
    return {"background": True, "threshold": threshold}


# ---- images that are given


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
        if not os.path.isdir(entry):
            files += _named_files(entry)
            continue
        images, others = files_in(Path(entry), IMAGES + VIDEOS)
        if not images:
            beside = f", but {listed([path.name for path in others])}" if others else ""
            if any(path.is_dir() for path in Path(entry).iterdir()):
                deeper = Path(entry) / "**" / "*.jpg"
                beside += f"; folders inside it are searched only by a pattern such as '{deeper}'"
            kinds = ", ".join(IMAGES)
            raise UserError(f"folder {entry} holds no image (of {kinds}) or video{beside}")
        files += map(str, images)
        passed_over += map(str, others)
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
        left = {}
        for source in (source for source in sources if source not in names):
            path = Path(source)
            folders = [name for name in path.parent.parts if name not in (path.anchor, ".", "..")]
            pieces = [*folders, path.stem or "image", path.suffix[1:]]
            left[source] = "_".join(filter(None, pieces[-parts - 1 : -1] if parts else pieces))
        counts = collections.Counter((*left.values(), *names.values()))
        names |= {source: name for source, name in left.items() if counts[name] == 1}
    if left := [source for source in sources if source not in names]:
        raise UserError(f"results of {listed(left)} would have the names of others: rename them")
    return {source: names[source] for source in sources}


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
    except Exception:  # `read_image` will say what is wrong
        return False


def _animation(source: str) -> Iterator[np.ndarray]:
    try:
        with opened(Path(source).read_bytes()) as image:
            for number in range(image.n_frames):
                image.seek(number)
                yield np.asarray(upright(image))
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


# ---- results


def _check_free(path: Path, overwrite: bool) -> None:
    """Raises UserError where a file would be lost that may not be."""
    if not os.path.lexists(path):
        return
    content = path.read_bytes() if path.is_file() else b""
    if _MARK.encode() not in content and content.strip() != b"[]":
        raise UserError(f"{path} is there and is no result of predict: choose another --out")
    if not overwrite:
        raise UserError(f"{path} is there already: choose another --out, or add --overwrite")


def write_results(out: Path, picture: Picture, result: Segmentation, args: SimpleNamespace) -> Path:
    """Writes each of `args.formats`, or none where one cannot be written; returns the overlay, or
    where there is none the first file."""
    files = {kind: out / f"{picture.name}.{FORMATS[kind][0]}" for kind in args.formats}
    for path in files.values():
        _check_free(path, args.overwrite)
    replace_files({path: _content(kind, picture, result) for kind, path in files.items()})
    return files.get("overlay", files[args.formats[0]])


def _content(kind: str, picture: Picture, result: Segmentation) -> bytes | str:
    if kind == "png":
        return png(palette_image(result.labels, len(result.classes)), Software=_MARK)
    if kind == "overlay":
        return png(overlay(picture.image, result.labels, result.classes), Software=_MARK)
    if kind == "npz":
        stream = io.BytesIO()
        arrays = {"labels": result.labels, "groups": result.groups, "scores": result.scores}
        np.savez_compressed(stream, **arrays, classes=np.array(result.classes))
        # Behind the end of an archive there may be a comment.
        return stream.getvalue()[:-2] + len(_MARK).to_bytes(2, "little") + _MARK.encode()
    record = (_runs if kind == "rle" else _numbers)(picture.name, result)
    return json.dumps(record, indent=2) + "\n"


def summary(result: Segmentation, most: int = 5) -> str:
    """The largest classes with their share of the image, for a line: ``cat 43 %, cup 2 %``."""
    areas = result.areas
    order = [i for i in np.argsort(-areas, kind="stable") if areas[i] > 0]
    if not order:
        best = int(result.scores.argmax())
        return f"all background (best: {result.classes[best]}, {result.scores[best]:.2f})"
    parts = [f"{result.classes[i]} {100 * areas[i]:.3g} %" for i in order[:most]]
    more = len(order) - most
    return ", ".join(parts) + (f" and {more} more" if more > 0 else "")


def _numbers(name: str, result: Segmentation) -> dict[str, Any]:
    return {
        "image": name,
        "height": result.labels.shape[0],
        "width": result.labels.shape[1],
        "background": round(float((result.labels == 0).mean()), 6),
        "classes": [
            {"name": name, "area": round(float(area), 6), "score": round(float(score), 6)}
            for name, area, score in zip(result.classes, result.areas, result.scores, strict=True)
        ],
        "competitors": list(result.competitors),
        "protocol": result.protocol.as_dict(),
        "about": _MARK,
    }


def _runs(name: str, result: Segmentation) -> list[dict[str, Any]]:
    """An entry for each class that was found, in the form of COCO's segmentation results."""
    return [
        {
            "image_id": name,
            "category_id": label,
            "category": result.classes[label - 1],
            "score": round(float(result.scores[label - 1]), 6),
            "segmentation": segmentation,
            "about": _MARK,
        }
        for label, segmentation in run_lengths(result.labels).items()
    ]


def run_lengths(labels: Integer[np.ndarray, "H W"]) -> dict[int, dict[str, Any]]:
    """COCO's uncompressed run lengths of the mask of each label that is there, but for 0: column by
    column, zeros first."""
    flat, by_label = labels.T.reshape(-1), {}
    for label in np.unique(flat[flat > 0]).tolist():
        turns = np.flatnonzero(np.diff(flat == label, prepend=False))
        counts = np.diff(turns, prepend=0, append=flat.size).tolist()
        by_label[label] = {"size": list(labels.shape), "counts": counts}
    return by_label


if __name__ == "__main__":
    flags.run(main)
