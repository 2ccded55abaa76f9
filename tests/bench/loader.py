"""A loader without decoding against a plain copy of the same batches.

    PYTHONPATH=.:tests python tests/bench/loader.py [SECONDS]

Cached features of 4096 records (196 patches x 768, float16; three templates, 24 tokens x 768 of
text, float16) are read in batches of 256 with pairs, as in phase 2 of a run on cached features.
The reference copies arrays of the batch's sizes, row after row in random order, out of the same
files, so it has the same work for the memory and none besides. Both take turns, so that their
ratio holds on a machine that has other work. Prints GB/s of each and their ratio (1 is memory
speed) without and with a second image, and of batches of small features, where what is done for
each example counts most. Not run by pytest.
"""

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from memory_source import MemorySource

from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.examples import Loader
from ovseg_jax.data.feature_store import FeatureStore
from ovseg_jax.data.records import Record

RECORDS, BATCH, TEMPLATES = 4096, 256, ("a {}.", "the {}.", "{}")
NAMES = ("dog", "cat", "bus", "tree")


def stores(folder: Path, patches: int, width: int) -> tuple[FeatureStore, FeatureStore]:
    """Image and text features of random bits."""
    rng = np.random.default_rng(0)
    text = (24, width)
    shapes = {
        "caption_pooled": ((RECORDS, width), np.float16),
        "masked_tokens": ((RECORDS, *text), np.float16),
        "masked_mask": ((RECORDS, 24), np.bool_),
        "prompt_pooled": ((len(TEMPLATES), width), np.float16),
        "prompt_rows": ((RECORDS, len(TEMPLATES)), np.int32),
        "caption_starts": ((RECORDS + 1,), np.int64),
        "caption_rows": ((RECORDS,), np.int32),
        "masked_rows": ((RECORDS,), np.int32),
        "shared_pooled": ((len(NAMES), width), np.float16),
    }
    images = FeatureStore.create(
        folder / "images", "k", {"image": ((RECORDS, 1, patches, width), np.float16)}
    )
    row = rng.random((1, patches, width), np.float32).astype(np.float16)
    for index in range(RECORDS):
        images["image"][index] = row
    texts = FeatureStore.create(folder / "texts", "k", shapes)
    texts["caption_starts"][:] = np.arange(RECORDS + 1)
    for name in ("caption_rows", "masked_rows"):
        texts[name][:] = np.arange(RECORDS)
    texts["masked_mask"][:] = True
    texts["masked_tokens"][:] = row[0, 0]
    return images.commit(), texts.commit()


def plain(files: list[np.ndarray], batches: int, rng: np.random.Generator) -> int:
    """Copies random rows of each file into a new array, batch after batch; bytes in all."""
    size = 0
    for _ in range(batches):
        made = [
            np.stack([file[row] for row in rng.integers(RECORDS, size=BATCH)]) for file in files
        ]
        size += sum(array.nbytes for array in made)
    return size


def compare(patches: int, width: int, with_pairs: bool, seconds: float) -> None:
    """Times both ways in turns and prints their medians."""
    source = MemorySource(
        [
            Record(b"", (f"a {NAMES[i % 4]} and a {NAMES[i // 4 % 4]}",), str(i))
            for i in range(RECORDS)
        ]
    )
    entities = EntitySet({name: [name] for name in NAMES})
    with tempfile.TemporaryDirectory() as temporary:
        images, texts = stores(Path(temporary), patches, width)
        loader = Loader(
            source,
            entities,
            None,
            {"templates": TEMPLATES},
            batch_size=BATCH,
            seed=0,
            first_step=0,
            last_step=8,
            with_pairs=with_pairs,
            image_store=images,
            text_store=texts,
        )
        example = next(iter(loader))
        files = [images["image"][:, 0]] * (1 + with_pairs) + [texts["masked_tokens"]]
        rng = np.random.default_rng(1)
        ratios, speeds = [], []
        stop = time.monotonic() + seconds
        while time.monotonic() < stop or len(ratios) < 3:
            start = time.perf_counter()
            size = plain(files, 8, rng)
            middle = time.perf_counter()
            read = sum(array.nbytes for batch in loader for array in batch.values())
            end = time.perf_counter()
            copied, delivered = size / (middle - start), read / (end - middle)
            ratios.append(delivered / copied)
            speeds.append((delivered, copied, BATCH * 8 / (end - middle)))
        fast, reference, examples = (median(column) for column in zip(*speeds, strict=True))
    megabytes = sum(array.nbytes for array in example.values()) / 2**20
    print(
        f"{patches} x {width}{', pairs' if with_pairs else '':7} {megabytes:6.1f} MB a batch: "
        f"{fast / 1e9:5.2f} GB/s ({examples:,.0f} examples/s), copy {reference / 1e9:5.2f} GB/s, "
        f"ratio {median(ratios):.2f}"
    )


if __name__ == "__main__":
    time_each = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    for shape in ((196, 768, False), (196, 768, True), (16, 64, False)):
        compare(*shape, time_each)
