"""Segment your own images with your own words.

``python -m ovseg_jax.predict --model=DIR --images=a.jpg,b.png --classes="cat,dog" --out=DIR``
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from ovseg_jax import flags
from ovseg_jax.compile_cache import enable_compilation_cache
from ovseg_jax.data.augment import UnreadableImage, decode
from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.distractors import check_class_names, with_distractors
from ovseg_jax.segmentation.labels import class_probabilities, label_maps
from ovseg_jax.segmentation.palette import write_palette_png
from ovseg_jax.segmentation.pictures import overlay
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.segmentation.scores import ImageScores, image_scores, with_scale, without_index
from ovseg_jax.segmentation.segmenter import ModelSegmenter
from ovseg_jax.weights.model_dir import load_model

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
    images = [_read(path) for path in paths]
    enable_compilation_cache()
    saved = load_model(args.model)
    protocol = Protocol.from_config(saved.info["protocol"])
    if protocol.threshold is None:
        protocol = protocol.replace(threshold=0.0)
    segmenter = ModelSegmenter.of_saved(saved, protocol)
    protocol = with_scale(protocol, segmenter)
    minimum = args.words or saved.info["provenance"].get("calibrated_words", 20)
    words = with_distractors(args.classes, minimum=minimum)
    text = segmenter.text(words, protocol.templates)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    scored = image_scores(without_index(segmenter.encode), text, images, protocol, batch_size=4)
    for scores, labels in label_maps(scored, protocol, classes=len(args.classes), group=1):
        path = paths[scores.index]
        _write(out, path.stem, images[scores.index], labels, scores, args.classes, protocol)
        print(f"{path}: {out / path.stem}.overlay.png")
    return 0


def _same_names(paths: list[Path]) -> str | None:
    seen: set[str] = set()
    for path in paths:
        if path.stem in seen:
            return path.stem
        seen.add(path.stem)
    return None


def _read(path: Path) -> np.ndarray:
    try:
        return np.asarray(decode(path.read_bytes()))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnreadableImage as error:
        raise UserError(f"{path} is no image that can be read: {error.cause}") from None


def _write(
    out: Path,
    stem: str,
    image: np.ndarray,
    labels: np.ndarray,
    scores: ImageScores,
    classes: list[str],
    protocol: Protocol,
) -> None:
    write_palette_png(out / f"{stem}.mask.png", labels, len(classes))
    picture: Image.Image = overlay(image, labels, classes)
    picture.save(out / f"{stem}.overlay.png")
    p = class_probabilities(scores, protocol)
    found = [
        {
            "name": name,
            "area": round(float((labels == 1 + index).mean()), 6),
            "score": round(float(p[..., index].max()), 6),
        }
        for index, name in enumerate(classes)
    ]
    record = {
        "image": stem,
        "height": image.shape[0],
        "width": image.shape[1],
        "background": round(float((labels == 0).mean()), 6),
        "classes": found,
        "protocol": protocol.as_dict(),
    }
    (out / f"{stem}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    flags.run(main)
