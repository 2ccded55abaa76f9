"""Segment your own images with your own words.

``python -m ovseg_jax.predict --model=DIR --images=a.jpg,b.png --classes="cat,dog" --out=DIR``
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import ovseg_jax
from ovseg_jax import flags
from ovseg_jax.compile_cache import enable_compilation_cache
from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.distractors import check_class_names
from ovseg_jax.segmentation.loaded import Segmentation, read_image
from ovseg_jax.segmentation.palette import write_palette_png
from ovseg_jax.segmentation.pictures import overlay

ABOUT = """Segment images into classes that you name.

Writes for each image NAME.mask.png (palette; 0 is background, then the classes in order),
NAME.overlay.png (with a legend) and NAME.json (area and score of each class).
With few classes, everyday words are added to the competition, so that one class alone does not
take every pixel; what they win becomes background.
"""

FLAGS = (
    flags.Flag("model", required=True, help="model directory"),
    flags.Flag("images", flags.comma_list, required=True, help="image files, comma-separated"),
    flags.Flag("classes", flags.comma_list, required=True, help="class names, comma-separated"),
    flags.Flag("out", default="predictions", help="folder for the results"),
    flags.Flag("words", int, default=0, help="words that compete in all; 0: as in calibration"),
)


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code."""
    args = flags.parse(argv, FLAGS, ABOUT)
    check_class_names(args.classes)
    paths = [Path(name) for name in args.images]
    if not paths:
        raise UserError("--images is empty: name at least one file")
    if clash := _same_names(paths):
        raise UserError(f"--images holds two files called {clash!r}; results would overwrite")
    images = [read_image(path) for path in paths]
    enable_compilation_cache()
    model = ovseg_jax.load(args.model)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for index, found in model.segment_each(images, args.classes, words=args.words):
        path = paths[index]
        _write(out, path.stem, images[index], found, model.protocol.as_dict())
        print(f"{path}: {out / path.stem}.overlay.png")
    return 0


def _same_names(paths: list[Path]) -> str | None:
    seen: set[str] = set()
    for path in paths:
        if path.stem in seen:
            return path.stem
        seen.add(path.stem)
    return None


def _write(
    out: Path, stem: str, image: np.ndarray, found: Segmentation, protocol: dict[str, Any]
) -> None:
    write_palette_png(out / f"{stem}.mask.png", found.labels, len(found.classes))
    picture: Image.Image = overlay(image, found.labels, list(found.classes))
    picture.save(out / f"{stem}.overlay.png")
    record = {
        "image": stem,
        "height": image.shape[0],
        "width": image.shape[1],
        "background": round(float((found.labels == 0).mean()), 6),
        "classes": [
            {"name": name, "area": round(float(area), 6), "score": round(float(score), 6)}
            for name, area, score in zip(found.classes, found.areas, found.scores, strict=True)
        ],
        "protocol": protocol,
    }
    (out / f"{stem}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    flags.run(main)
