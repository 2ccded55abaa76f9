"""Peak memory of preparation and of a loader, for few and for many records.

    PYTHONPATH=. python tests/bench/prepare_memory.py [FEW MANY [FOLDER]]

Made-up captions with one small JPEG (10 000 and 1 000 000 by default: about 2 GB of disk in FOLDER,
a temporary one by default) are prepared in a process of its own, and 20 batches of 256 pairs are
read from the result in another. Prints for each the peak of resident memory, and what the larger
set takes more, beside the 8 bytes an entity mention of its index. Not run by pytest.
"""

import io
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from caption_corpus import captions
from PIL import Image

from ovseg_jax.data.prepare.pairs import InputShard, RawPair

ROOT = Path(__file__).parents[2]
PER_SHARD = 10_000
PREPARE = """
from pathlib import Path
from prepare_memory import MadeUp
from ovseg_jax.data.prepare.pipeline import parse_choice
from ovseg_jax.prepare import local_jobs
from ovseg_jax.data.prepare.rules import Rules
from ovseg_jax.data.prepare.pipeline import prepare
prepare(MadeUp({count}), Path({out!r}), parse_choice("published"), Rules(),
        run_jobs=local_jobs(0), say=lambda line: None)
"""
LOAD = """
from pathlib import Path
from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.examples import Loader
from ovseg_jax.data.records import ArrayRecordSource
from ovseg_jax.data.tokenizer import Tokenizer
source = ArrayRecordSource({out!r})
spec = {{"text_length": 16, "transform": {{"kind": "crop", "size": 32}}}}
loader = Loader(source, EntitySet(source.manifest.entities), Tokenizer({tokens!r}), spec,
                     batch_size=256, seed=0, first_step=0, last_step=20, with_pairs=True)
assert sum(int(batch["pair_weight"].sum()) for batch in loader) > 20 * 200
"""
PEAK = "\nimport resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"


class MadeUp:
    """A source of `count` pairs; shards have texts of their own."""

    name = "made up"

    def __init__(self, count: int):
        self.count = count
        stream = io.BytesIO()
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(stream, "JPEG")
        self.image = stream.getvalue()

    def shards(self) -> list[InputShard]:
        starts = range(0, self.count, PER_SHARD)
        return [InputShard(f"{s}", s, min(s + PER_SHARD, self.count)) for s in starts]

    def read(self, shard: InputShard, *, images: bool = True) -> Iterator[RawPair]:
        texts = captions(shard.stop - shard.start, seed=shard.start)
        for number, caption in enumerate(texts, shard.start):
            yield RawPair(f"{number:09d}", (caption,), self.image if images else None)


def peak(program: str) -> float:
    """MB of resident memory at most, of a process that runs `program`."""
    path = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]\n"
    done = subprocess.run(
        [sys.executable, "-c", path + program + PEAK],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stderr)
    return int(done.stdout.split()[-1]) / 1024


def main(few: int, many: int, folder: Path) -> None:
    """Prints the table."""
    words = folder / "tokenizer"
    words.mkdir()
    (words / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nof\n")
    found: dict[str, list[float]] = {"prepare": [], "loader": []}
    index = []
    for count in (few, many):
        out = folder / str(count)
        found["prepare"].append(peak(PREPARE.format(count=count, out=str(out))))
        found["loader"].append(peak(LOAD.format(out=str(out), tokens=str(words))))
        index.append((out / "entities.records.npy").stat().st_size / 2**20)
    print(f"index of entity mentions: {index[0]:.1f} MB of {few} pairs, {index[1]:.1f} of {many}")
    for name, (small, large) in found.items():
        print(
            f"{name:8s} peak {small:7.1f} MB for {few}, {large:7.1f} MB for {many}: "
            f"{large - small:+.1f} MB, {large - small - index[1]:+.1f} beyond the index"
        )


if __name__ == "__main__":
    sizes = [int(text) for text in sys.argv[1:3]] or [10_000, 1_000_000]
    if len(sys.argv) > 3:
        Path(sys.argv[3]).mkdir(parents=True, exist_ok=True)
        main(*sizes, Path(sys.argv[3]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(*sizes, Path(temporary))
