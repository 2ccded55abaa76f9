"""What segmenting costs, with random weights. Not run by pytest.

    PYTHONPATH=. python tests/bench/segment_cost.py memory [MEGAPIXELS] [CLASSES]
    PYTHONPATH=. python tests/bench/segment_cost.py speed [IMAGES] [TURNS]

`memory`: one image of 50 megapixels (3:4) with 150 classes and a ViT-B of `configs/vitb.py`, its
label map, and the picture with the names. Printed are the peak resident memory of the process (aim:
below 4 GB; float maps of the classes would take 30), what of it was there before, and the time.

`speed`: images of 500 x 375 pixels, two windows each, with `configs/vits.py` and the released
protocol, against the released way: a window at a time, and the encoder twice on each. The ways take
turns, and the fastest turn of each counts. Printed: images a second, the ratio to the released way
(aim: 1.7 for what is done by default), and how many pixels have another label.
"""

import resource
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np

from ovseg_jax.models.build import build_model, init_params, init_statistics
from ovseg_jax.segmentation.labels import label_maps
from ovseg_jax.segmentation.pictures import overlay
from ovseg_jax.segmentation.protocol import Protocol, named_protocol
from ovseg_jax.segmentation.scores import ModelSegmenter, default_batch, image_scores
from ovseg_jax.segmentation.vocabulary import Vocabulary
from ovseg_jax.sharding import make_mesh
from ovseg_jax.train.config import load_config

RNG = np.random.default_rng(0)


def segmenter_of(spec: str, protocol: Protocol, classes: int) -> tuple[ModelSegmenter, Vocabulary]:
    """A model of a config with random weights, words, and random embeddings of them."""
    config = load_config(spec)
    model = build_model(config.model)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    fields = {"protocol": protocol, "batch_stats": init_statistics(model), "mesh": make_mesh()}
    segmenter = ModelSegmenter(model, params, None, text_length=8, **fields)
    text = RNG.normal(size=(classes, config.model.joint_width)).astype(np.float32)
    segmenter.text = lambda names, templates: (text, text)
    return segmenter, Vocabulary.of([f"class {i}" for i in range(classes)])


def picture(height: int, width: int, blocks: tuple[int, int]) -> np.ndarray:
    """Blocks of color."""
    coarse = RNG.integers(0, 256, (*blocks, 3), np.uint8)
    rows, columns = np.arange(height) * blocks[0] // height, np.arange(width) * blocks[1] // width
    return coarse[rows][:, columns]


def memory(megapixels: int = 50, classes: int = 150) -> None:
    """Segments one image and prints the figures."""

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    width = round((megapixels * 1e6 * 4 / 3) ** 0.5)
    image = picture(round(megapixels * 1e6 / width), width, (64, 64))
    for order in ("argmax_first", "upsample_first"):
        protocol = named_protocol("paper").replace(order=order, scale=14.0)
        segmenter, words = segmenter_of("configs/vitb.py:smoke", protocol, classes)
        before, start = peak(), time.perf_counter()
        scored = image_scores(segmenter, words, [image], protocol, 4)
        ((_, labels),) = label_maps(scored, protocol, group=1)
        seconds = time.perf_counter() - start
        overlay(image, labels, words.classes)
        print(f"{order}: peak {peak():.2f} GB, {before:.2f} GB before; {seconds:.1f} s")


def speed(images: int = 8, turns: int = 3) -> None:
    """Times all ways in turns and prints the fastest turn of each."""
    protocol = named_protocol("released").replace(scale=14.0)
    segmenter, words = segmenter_of("configs/vits.py:smoke", protocol, 20)
    data = [picture(375, 500, (6, 8)) for _ in range(images)]

    def twice(pixels: np.ndarray) -> tuple:
        affinity, groups, _ = jax.block_until_ready(segmenter.encode(pixels))
        return affinity, groups, jax.block_until_ready(segmenter.encode(pixels))[2]

    ways = {"encoder twice on each window": (twice, 1)}
    for batch in sorted({1, 4, default_batch(protocol.window)}):
        default = ", the default" * (batch == default_batch(protocol.window))
        ways[f"once, {batch} windows a batch{default}"] = (segmenter.encode, batch)

    def labels(way: str) -> np.ndarray:
        encode, batch = ways[way]
        way = SimpleNamespace(encode=encode, text=segmenter.text)
        scored = image_scores(way, words, data, protocol, batch)
        found = {one.index: result for one, result in label_maps(scored, protocol)}
        return np.stack([found[index] for index in range(images)])

    results = {way: labels(way) for way in ways}  # compiles
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(turns):
        for way in ways:
            start = time.perf_counter()
            labels(way)
            times[way].append(time.perf_counter() - start)
    first = next(iter(ways))
    for way in ways:
        rate, ratio = images / min(times[way]), min(times[first]) / min(times[way])
        other = 100 * (results[way] != results[first]).mean()
        print(f"{way:36} {rate:7.3f} images/s  {ratio:.2f} x  {other:.4f} % of the pixels differ")


if __name__ == "__main__":
    {"memory": memory, "speed": speed}[sys.argv[1]](*map(int, sys.argv[2:]))
