"""Peak memory and time of segmenting one image of 50 megapixels with 150 classes.

    PYTHONPATH=. python tests/bench/segment_memory.py [MEGAPIXELS] [CLASSES]

A ViT-B sized like `configs/vitb.py` with random weights segments an image of 3:4; the label map is
made, and the picture with the names. Printed are the peak resident memory of the process (aim:
below 4 GB), what of it was there before the image, and the time. Whole float maps of the classes
would take 30 GB. Not run by pytest.
"""

import resource
import sys
import time

import jax
import numpy as np

from ovseg_jax.models.build import build_model, init_params
from ovseg_jax.segmentation.labels import label_maps
from ovseg_jax.segmentation.pictures import overlay
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.segmentation.scores import ModelSegmenter, image_scores
from ovseg_jax.segmentation.vocabulary import Vocabulary
from ovseg_jax.sharding import make_mesh
from ovseg_jax.train.config import load_config


def peak() -> float:
    """Peak resident memory so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main(megapixels: float, classes: int) -> None:
    """Segments one image and prints the figures."""
    config = load_config("configs/vitb.py:smoke")
    model = build_model(config.model)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    width = round((megapixels * 1e6 * 4 / 3) ** 0.5)
    height = round(megapixels * 1e6 / width)
    rng, mesh = np.random.default_rng(0), make_mesh()
    coarse = rng.integers(0, 256, (64, 64, 3), np.uint8)
    rows, columns = np.arange(height) * 64 // height, np.arange(width) * 64 // width
    image = coarse[rows][:, columns]
    words = Vocabulary.of([f"class {i}" for i in range(classes)])
    text = rng.normal(size=(classes, config.model.joint_width)).astype(np.float32)
    for order in ("argmax_first", "upsample_first"):
        protocol = Protocol.from_config({**config.eval.protocol, "order": order})
        segmenter = ModelSegmenter(
            model, params, None, text_length=8, protocol=protocol, batch_stats={}, mesh=mesh
        )
        segmenter.text = lambda names, templates: (text, text)
        before, start = peak(), time.perf_counter()
        scored = image_scores(segmenter, words, [image], protocol, 4)
        ((_, labels),) = label_maps(scored, protocol, group=1)
        seconds = time.perf_counter() - start
        overlay(image, labels, words.classes)
        print(
            f"{order}: {width} x {height} pixels, {classes} classes: peak {peak():.2f} GB, of it "
            f"{before:.2f} GB before; {seconds:.1f} s"
        )


if __name__ == "__main__":
    numbers = [float(x) for x in sys.argv[1:3]]
    main(numbers[0] if numbers else 50.0, int(numbers[1]) if len(numbers) > 1 else 150)
