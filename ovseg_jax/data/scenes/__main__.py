"""`python -m ovseg_jax.data.scenes`: print the statistics of a split, draw a contact sheet."""

from pathlib import Path

import numpy as np
from PIL import Image

from ovseg_jax import flags
from ovseg_jax.data.scenes import CLASSES, SPLITS, ScenesSource, describe, scene_at
from ovseg_jax.data.scenes.layout import layout_at

FLAGS = (
    flags.Flag("split", default="train", choices=tuple(SPLITS), help="which scenes"),
    flags.Flag("count", int, 500, "scenes measured"),
    flags.Flag("seed", int, 0, "of the scenes"),
    flags.Flag("size", int, 196, "pixels a side"),
    flags.Flag("captions", int, 10, "captions printed"),
    flags.Flag("sheet", Path, help="file for a contact sheet, such as scenes.png"),
)
_ROWS, _COLUMNS = 4, 8


def contact_sheet(split: str, seed: int, size: int) -> Image.Image:
    """Rows of scenes, each above its labels in one color per class."""
    hues = np.linspace(0, 255, len(CLASSES), endpoint=False)
    colors = np.stack([hues, np.full_like(hues, 190), np.full_like(hues, 240)], axis=-1)
    bright = np.asarray(Image.fromarray(colors.astype(np.uint8)[None], "HSV").convert("RGB"))[0]
    palette = np.concatenate([np.full((1, 3), 30, np.uint8), bright])
    strips = []
    for row in range(_ROWS):
        scenes = [scene_at(seed, split, row * _COLUMNS + c, size) for c in range(_COLUMNS)]
        strips.append(np.concatenate([scene.image for scene in scenes], axis=1))
        strips.append(np.concatenate([palette[scene.labels] for scene in scenes], axis=1))
    return Image.fromarray(np.concatenate(strips, axis=0))


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code."""
    args = flags.parse(argv, FLAGS, __doc__)
    ScenesSource(args.split, args.count, args.seed, args.size)  # refuses numbers that cannot be
    for name, value in describe(args.split, args.count, args.seed, args.size).items():
        print(f"{name:24s}{value:8.3f}")
    for index in range(args.captions):
        print(layout_at(args.seed, args.split, index).caption)
    if args.sheet:
        contact_sheet(args.split, args.seed, args.size).save(args.sheet)
    return 0


if __name__ == "__main__":
    flags.run(main)
