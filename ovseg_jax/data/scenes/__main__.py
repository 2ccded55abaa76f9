"""`python -m ovseg_jax.data.scenes`: print the statistics of a split, draw a contact sheet."""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from ovseg_jax.data.scenes import CLASSES, describe, scene_at
from ovseg_jax.data.scenes.layout import layout_at
from ovseg_jax.errors import UserError


def contact_sheet(split: str, seed: int, size: int, rows: int, columns: int) -> Image.Image:
    """Rows of scenes, each above its labels in one color per class."""
    hues = np.linspace(0, 255, len(CLASSES), endpoint=False)
    colors = np.stack([hues, np.full_like(hues, 190), np.full_like(hues, 240)], axis=-1)
    bright = np.asarray(Image.fromarray(colors.astype(np.uint8)[None], "HSV").convert("RGB"))[0]
    palette = np.concatenate([np.full((1, 3), 30, np.uint8), bright])
    strips = []
    for row in range(rows):
        scenes = [scene_at(seed, split, row * columns + c, size) for c in range(columns)]
        strips.append(np.concatenate([scene.image for scene in scenes], axis=1))
        strips.append(np.concatenate([palette[scene.labels] for scene in scenes], axis=1))
    return Image.fromarray(np.concatenate(strips, axis=0))


def main(arguments: list[str] | None = None) -> int:
    """Parse the flags, print, write. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ovseg_jax.data.scenes", description=__doc__)
    parser.add_argument("--split", default="train", help="train, tune or test")
    parser.add_argument("--count", type=int, default=500, help="scenes measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=196, help="pixels a side")
    parser.add_argument("--captions", type=int, default=10, help="captions printed")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet here")
    flags = parser.parse_args(arguments)
    try:
        for name, value in describe(flags.split, flags.count, flags.seed, flags.size).items():
            print(f"{name:24s}{value:8.3f}")
        for index in range(flags.captions):
            print(layout_at(flags.seed, flags.split, index).caption)
        if flags.sheet:
            contact_sheet(flags.split, flags.seed, flags.size, rows=4, columns=8).save(flags.sheet)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
