"""Segment your own images with your own words.

``python -m ovseg_jax.predict --images=a.jpg,b.png --classes="cat,dog" --out=DIR``
"""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from tqdm import tqdm

import ovseg_jax
from ovseg_jax import flags
from ovseg_jax.errors import UserError
from ovseg_jax.platforms import enable_compilation_cache
from ovseg_jax.segmentation.inputs import Picture, find_pictures, pictures, result_names
from ovseg_jax.segmentation.outputs import (
    FORMATS,
    check_formats,
    shown_file,
    summary,
    write_results,
)
from ovseg_jax.segmentation.vocabulary import Vocabulary, word_list

ABOUT = (
    """Segment images into classes that you name.

    python -m ovseg_jax.predict --images=holiday/ --classes="cat|kitten,dog"
    find . -name '*.jpg' | python -m ovseg_jax.predict --model=DIR --images=- --vocabulary=coco

Formats: """
    + "\n         ".join(FORMATS.values())
    + """

With few classes, everyday words compete too, so that a single class does not take every pixel; what
they win becomes background. An image that fails is reported and the others are still done; the exit
code is then 1.
"""
)

FLAGS = (
    flags.Flag("model", default="photos", help="model directory, or the name of a shipped model"),
    flags.Flag(
        "images",
        flags.comma_list,
        required=True,
        help="files, folders, globs, videos, or - to read a list from stdin; comma-separated",
    ),
    flags.Flag(
        "classes", flags.comma_list, help="class names, comma-separated; synonyms as cat|kitten"
    ),
    flags.Flag("vocabulary", help="a list of classes: voc, coco, ade20k, ..., or a text file"),
    flags.Flag(
        "background",
        help="a threshold from 0 to 1, 'none' for no background, or words that stand for it; "
        "by default the model's threshold",
    ),
    flags.Flag("out", default="predictions", help="folder for the results"),
    flags.Flag(
        "formats", flags.comma_list, default=["png", "overlay", "json"], help="what to write"
    ),
    flags.Flag("words", int, default=0, help="total of competing words; 0: as in calibration"),
    flags.Flag("batch_size", int, default=0, help="windows encoded at once; 0 to choose"),
    flags.Flag("every", int, default=1, help="take every N-th frame of videos"),
    flags.Flag("flip", bool, default=False, help="average with the mirrored image"),
    flags.Flag("scales", flags.comma_list, help="average over sizes, such as 0.75,1,1.25"),
    flags.Flag("pamr", int, default=0, help="rounds of refinement by the image's colors"),
)


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code."""
    args = flags.parse(argv, FLAGS, ABOUT)
    if (args.classes is None) == (args.vocabulary is None):
        raise UserError("give exactly one of --classes and --vocabulary")
    classes = list(word_list(args.vocabulary)) if args.vocabulary else args.classes
    background = _background(args.background)
    words = background["background"]
    vocabulary = Vocabulary.of(classes, words if isinstance(words, list) else ())
    check_formats(args.formats, len(vocabulary.classes))
    for name in ("words", "batch_size"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name}={getattr(args, name)} must be at least 1, or 0 to choose")
    sources = find_pictures(args.images, sys.stdin, every=args.every)
    result_names(sources)  # raises now, not later, if two would write the same files
    enable_compilation_cache()
    model = ovseg_jax.load(args.model, **_settings(args))
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror or error}") from None
    return _segment(model, sources, classes, background, args, out)


def _segment(
    model: Any,
    sources: list[str],
    classes: list[str],
    background: dict[str, Any],
    args: SimpleNamespace,
    out: Path,
) -> int:
    """Segments every image that can be read; 1 if any failed."""
    failed, done, empty = 0, 0, 0
    order = itertools.count()  # `segment_each` counts only the images that it gets
    waiting: dict[int, tuple[Picture, np.ndarray]] = {}
    written: dict[str, str] = {}
    bar = tqdm(total=len(sources), unit=" images", disable=None)

    def fail(reason: str) -> None:
        nonlocal failed
        failed += 1
        _say(f"error: {reason}", sys.stderr)
        bar.update()

    def readable() -> Iterator[np.ndarray]:
        for picture in pictures(sources, args.every):
            if other := written.get(picture.name):
                fail(f"{picture.source} would overwrite the result of {other}: rename one")
                continue
            try:
                image = picture.read()
            except UserError as error:
                fail(str(error))
                continue
            written[picture.name] = picture.source
            waiting[next(order)] = (picture, image)
            yield image

    with bar:
        for index, result in model.segment_each(
            readable(), classes, **background, words=args.words, batch_size=args.batch_size
        ):
            picture, image = waiting.pop(index)
            files = write_results(out, picture.name, image, result, args.formats)
            done, empty = done + 1, empty + (not result.labels.any())
            _say(f"{picture.source}: {summary(result)} -> {shown_file(files)}", sys.stdout)
            bar.total = max(bar.total, done + failed)  # a video is one source of many images
            bar.update()
    if empty:
        _say(
            f"nothing was found in {empty} of {done} images. --words=N lets N words compete "
            "(fewer find more), --background=0 or none asks for less certainty or for none",
            sys.stderr,
        )
    if failed:
        _say(f"{failed} of {done + failed} images failed", sys.stderr)
    return 1 if failed else 0


def _say(text: str, file: Any) -> None:
    """Writes a line above the progress bar, at once even into a pipe."""
    tqdm.write(text, file=file)
    file.flush()


def _background(text: str | None) -> dict[str, Any]:
    """The arguments of `segment` for a value of --background."""
    if text is None:
        return {"background": True}
    if text.lower() == "none":
        return {"background": False}
    try:
        threshold = float(text)
    except ValueError:
        words = flags.comma_list(text)
        if not words:
            raise UserError("--background is a threshold, 'none', or words") from None
        return {"background": words}
    if not 0 <= threshold <= 1:
        raise UserError(f"--background={text}: a threshold is a probability, from 0 to 1")
    return {"background": True, "threshold": threshold}


def _settings(args: SimpleNamespace) -> dict[str, Any]:
    """The fields of the protocol that the flags change."""
    settings: dict[str, Any] = {}
    if args.flip:
        settings["flip"] = True
    if args.scales:
        try:
            settings["scales"] = tuple(float(text) for text in args.scales)
        except ValueError:
            raise UserError(f"--scales={','.join(args.scales)} are not numbers") from None
    if args.pamr:
        settings["pamr_steps"] = args.pamr
    return settings


if __name__ == "__main__":
    flags.run(main)
