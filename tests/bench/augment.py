"""Decoding and stage-1 augmentation on one core, against the same steps in plain Pillow and NumPy.

    PYTHONPATH=. taskset -c 0 python tests/bench/augment.py [SECONDS]

Plain is: decode the whole file, crop, resize, flip, RandAugment, to float, normalize, erase. Ours
hands uint8 to the device, which normalizes and erases, and (second row) decodes JPEG files at a
reduced size where the crop allows. All see the same files and random draws, in turns, so that
their ratio holds on a machine that has other work. For files of 1024 and of 256 pixels it prints
images a second, the ratio to plain (aim: 1.5 at 1024), and how far reduced decoding moves pixels.
Not run by pytest.
"""

import io
import sys
import time
from statistics import median

import numpy as np
from PIL import Image

from ovseg_jax.data.augment import complete_transform, rand_augment, train_image
from ovseg_jax.data.decoding import crop_box

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
STAGE_1 = {
    "kind": "crop",
    "size": 224,
    "scale": (0.08, 1.0),
    "rand_augment": {"operations": 2},
    "erase": {"probability": 0.25},
}
WHOLE = complete_transform(STAGE_1)
REDUCED = complete_transform({**STAGE_1, "reduced_decoding": True})
CROP = complete_transform({"kind": "crop", "size": 224, "scale": (0.08, 1.0)})
FILES, GROUP = 16, 8


def picture(side: int, seed: int) -> bytes:
    """A JPEG with detail at every scale, as photographs have: about 2 bits a pixel."""
    rng = np.random.default_rng(seed)
    total = np.zeros((side, side, 3), np.float32)
    cells = 4
    while cells <= side:
        coarse = rng.normal(size=(cells, cells, 3)).astype(np.float32)
        octave = np.stack(
            [np.asarray(Image.fromarray(coarse[..., c]).resize((side, side), 3)) for c in range(3)],
            -1,
        )
        total += octave * 60 / cells**0.5
        cells *= 2
    stream = io.BytesIO()
    pixels = np.clip(total + 128, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def plain(data: bytes, rng: np.random.Generator) -> np.ndarray:
    """The published pipeline, step after step."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    box = crop_box(image.size, rng, WHOLE["scale"], WHOLE["ratio"])
    image = image.crop(box).resize((224, 224), Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = rand_augment(image, rng, WHOLE["rand_augment"])
    pixels = (np.asarray(image, np.float32) / 255 - MEAN) / STD
    if rng.random() < 0.25:
        area, aspect = 224**2 * rng.uniform(0.02, 1 / 3), np.exp(rng.uniform(-1.2, 1.2))
        down, across = (
            min(223, round(float(side))) for side in np.sqrt([area * aspect, area / aspect])
        )
        top, left = rng.integers(0, 224 - down), rng.integers(0, 224 - across)
        noise = rng.standard_normal((down, across, 3), np.float32)
        pixels[top : top + down, left : left + across] = noise
    return pixels


def compare(side: int, seconds: float) -> None:
    """Times all ways in turns and prints their medians."""
    files = [picture(side, seed) for seed in range(FILES)]
    ways = {
        "plain Pillow": plain,
        "whole": lambda data, rng: train_image(data, rng, WHOLE),
        "reduced": lambda data, rng: train_image(data, rng, REDUCED),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    stop, turn = time.monotonic() + seconds, 0
    while time.monotonic() < stop or turn < 3:
        for name, way in ways.items():
            start = time.perf_counter()
            for index in range(GROUP):
                seed = turn * GROUP + index
                way(files[seed % FILES], np.random.default_rng(seed))
            times[name].append((time.perf_counter() - start) / GROUP)
        turn += 1
    size = sum(map(len, files)) / FILES
    print(f"{side} px JPEG, {size / 1024:.0f} KiB each, {turn} turns of {GROUP} images")
    for name in ways:
        ratio = median(p / t for p, t in zip(times["plain Pillow"], times[name], strict=True))
        print(f"  {name:14} {1 / median(times[name]):7.1f} images/s   {ratio:.2f} x plain")
    moved = [
        np.abs(a.astype(np.float32) - b).mean()
        for a, b in (
            [
                train_image(data, np.random.default_rng(seed), {**CROP, "reduced_decoding": way})
                for way in (False, True)
            ]
            for seed, data in enumerate(files)
        )
    ]
    print(f"  reduced moves a pixel by {np.mean(moved):.2f} levels, {max(moved):.2f} in the worst")


if __name__ == "__main__":
    for pixels in (1024, 256):
        compare(pixels, float(sys.argv[1]) if len(sys.argv) > 1 else 20.0)
