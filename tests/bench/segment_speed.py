"""Images a second of an evaluation, against the released way of doing it, in one run.

    PYTHONPATH=. python tests/bench/segment_speed.py [IMAGES] [TURNS]

The released way works on a window at a time and runs the encoder twice on each (once for the
groups, once for the embedding of the window). Ways differ in how they call the same compiled
functions with the same weights (random, of `configs/vits.py`; the released protocol); images of
500 x 375 pixels, two windows each. They take turns on a machine that may have other work, and the
fastest turn of each counts. Printed: images a second, the ratio to the released way (aim: 1.7 for
what is done by default), and how many pixels have another label. Not run by pytest.
"""

import sys
import time
from types import SimpleNamespace

import jax
import numpy as np

from ovseg_jax.models.build import build_model, init_params, init_statistics
from ovseg_jax.segmentation.labels import label_maps
from ovseg_jax.segmentation.protocol import named_protocol
from ovseg_jax.segmentation.scores import ModelSegmenter, default_batch, image_scores
from ovseg_jax.segmentation.vocabulary import Vocabulary
from ovseg_jax.sharding import make_mesh
from ovseg_jax.train.config import load_config

CLASSES, SIZE, BATCHES = 20, (375, 500), (4,)


def picture(seed: int) -> np.ndarray:
    """Blocks of color."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, 3), np.uint8)
    return coarse.repeat(63, 0).repeat(63, 1)[: SIZE[0], : SIZE[1]]


def main(images: int, turns: int) -> None:
    """Times all ways in turns and prints the fastest turn of each."""
    config = load_config("configs/vits.py:smoke")
    model = build_model(config.model)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    protocol = named_protocol("released").replace(scale=14.0)
    segmenter = ModelSegmenter(
        model,
        params,
        None,
        text_length=8,
        protocol=protocol,
        batch_stats=init_statistics(model),
        mesh=make_mesh(),
    )
    rng = np.random.default_rng(0)
    text = rng.normal(size=(CLASSES, config.model.joint_width)).astype(np.float32)
    words = Vocabulary.of([f"class {i}" for i in range(CLASSES)])
    data = [picture(seed) for seed in range(images)]

    def twice(pixels: np.ndarray) -> tuple:
        affinity, groups, _ = jax.block_until_ready(segmenter.encode(pixels))
        return affinity, groups, jax.block_until_ready(segmenter.encode(pixels))[2]

    once = segmenter.encode
    ways = {"encoder twice on each window": (twice, 1)}
    for batch in sorted({1, *BATCHES, default_batch(protocol.window)}):
        default = ", the default" * (batch == default_batch(protocol.window))
        ways[f"once, {batch} windows a batch{default}"] = (once, batch)

    def labels(way: str) -> list[np.ndarray]:
        encode, batch = ways[way]
        way = SimpleNamespace(encode=encode, text=lambda names, templates: (text, text))
        scored = image_scores(way, words, data, protocol, batch)
        found = {one.index: result for one, result in label_maps(scored, protocol)}
        return [found[index] for index in range(images)]

    results = {way: np.stack(labels(way)) for way in ways}  # compiles
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(turns):
        for way in ways:
            start = time.perf_counter()
            labels(way)
            times[way].append(time.perf_counter() - start)
    first = next(iter(ways))
    for way in ways:
        ratio = min(times[first]) / min(times[way])
        other = (results[way] != results[first]).mean()
        print(
            f"{way:36} {images / min(times[way]):7.3f} images/s  {ratio:.2f} x  "
            f"{100 * other:.4f} % of the pixels differ"
        )


if __name__ == "__main__":
    numbers = [int(x) for x in sys.argv[1:]]
    main(numbers[0] if numbers else 8, numbers[1] if len(numbers) > 1 else 3)
