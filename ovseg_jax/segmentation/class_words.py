"""Which words stand for the classes of a benchmark, and from which file they come."""

import functools
import json
from importlib import resources
from typing import Any

from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.benchmarks import Benchmark
from ovseg_jax.segmentation.distractors import competition
from ovseg_jax.segmentation.official import FOLDERS, UnseenAlone
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.segmentation.published import file_digest
from ovseg_jax.segmentation.vocabulary import Vocabulary

# Lists with synonyms, and what is in them for which benchmark.
_LISTS = {"sclip": "protocols/sclip_words.json", "everyday": "protocols/everyday_words.json"}


@functools.cache
def _list(which: str) -> dict[str, Any]:
    path = resources.files("ovseg_jax.segmentation") / _LISTS[which]
    return json.loads(path.read_text(encoding="utf-8"))["benchmarks"]


def words_of(benchmark: Benchmark, protocol: Protocol) -> tuple[Vocabulary, dict[str, str]]:
    """The words that compete on a benchmark, and the file of its classes' words with its digest.

    Args:
      protocol: for this benchmark. Its `class_names` choose the classes' words, and its
        `competing_words` how many everyday words are added, see `distractors.competition`.

    Raises:
      UserError: there are no such words for this benchmark.
    """
    vocabulary, file = class_words(benchmark, protocol.class_names)
    return competition(vocabulary, protocol), file


def class_words(benchmark: Benchmark, which: str) -> tuple[Vocabulary, dict[str, str]]:
    """The words of a benchmark's classes, and the file they are from with its digest.

    Args:
      which: 'released' (the words of the released model where they differ from the official
        names), 'official' names, 'sclip' (with synonyms, and words for the background), or
        'everyday' (the names with synonyms of ours; VOC and COCO Object alone). Sets that are not
        published have one list alone, for all of them. A benchmark of some classes of another one
        has their words, and none for the background.

    Raises:
      UserError: there are no such words for this benchmark.
    """
    if isinstance(benchmark, UnseenAlone):
        lines, file = class_words(benchmark.whole, which)
        return Vocabulary.of([lines.lines()[i] for i in benchmark.whole.zss]), file
    if benchmark.name not in FOLDERS:
        own = Vocabulary.of(getattr(benchmark, "entries", benchmark.class_names))
        return own, getattr(benchmark, "class_file", {})
    if which in _LISTS:
        words, name = _list(which), _LISTS[which]
        if benchmark.name not in words:
            raise UserError(
                f"protocol: class_names={which!r} has no words for benchmark {benchmark.name}"
            )
        own = words[benchmark.name]
        file = {"file": name, "sha256": file_digest("ovseg_jax.segmentation", name)}
        return Vocabulary.of(own["classes"], own["background"]), file
    table = f"tables/{FOLDERS[benchmark.name].base}.json"
    file = {"file": table, "sha256": file_digest("ovseg_jax.data.benchmarks", table)}
    names = benchmark.class_names if which == "released" else benchmark.official_names
    return Vocabulary.of(names), file
