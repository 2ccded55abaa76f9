"""A set of 23 records for tests of batches: one is broken, one names what no other does."""

import io

import numpy as np
from memory_source import MemorySource
from PIL import Image

from ovseg_jax.data.captions import mask_entities, prompt
from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.examples import Loader
from ovseg_jax.data.records import Record
from ovseg_jax.data.tokenizer import Tokenizer

NAMES = ("dog", "cat", "bus", "tree")
ENTITIES = EntitySet({name: [name] for name in NAMES})
TEMPLATES = ("a photo of a {}.", "a drawing of {}.", "{}")
SPEC = {
    "text_length": 12,
    "transform": {"kind": "crop", "size": 16, "scale": (0.4, 1.0)},
    "templates": TEMPLATES,
}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, *NAMES, "a", "and", "photo", "of", "sky"]
BROKEN = 3


def _record(index, rng):
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(buffer, "PNG")
    # Record 5 alone names a tree; every seventh names nothing.
    named = ["tree"] if index == 5 else [NAMES[index % 3], NAMES[(index // 3) % 3]]
    caption = "a sky" if index % 7 == 0 else "a photo of a " + " and a ".join(named)
    image = b"garbage" if index == BROKEN else buffer.getvalue()
    return Record(image, (caption,), f"key-{index}")


def make_source():
    """The 23 records."""
    rng = np.random.default_rng(0)
    return MemorySource([_record(index, rng) for index in range(23)])


def make_tokenizer(directory, words=WORDS):
    """BERT's tokenizer with these words, whose file is written into `directory`."""
    (directory / "vocab.txt").write_text("\n".join(words) + "\n")
    return Tokenizer(directory)


def load(source, tokenizer, entities=ENTITIES, spec=SPEC, **changes):
    """A loader of seven batches of eight, unless `changes` to its settings say otherwise."""
    settings = {"batch_size": 8, "seed": 1, "first_step": 0, "last_step": 7, "with_pairs": True}
    return Loader(source, entities, tokenizer, spec, **settings | {"threads": 2} | changes)


def read_batches(source, tokenizer, *more, **changes):
    """The batches of `load`."""
    return list(load(source, tokenizer, *more, **changes))


def joined(readers, slots):
    """The batches of several readers put together; each has read some of the slots."""
    columns = np.argsort(sum(slots, []))
    return [
        {name: np.concatenate([part[name] for part in parts])[columns] for name in parts[0]}
        for parts in zip(*readers, strict=True)
    ]


def assert_same(left, right):
    """Two lists of batches are equal to the bit."""
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def prompts_of(caption, templates=TEMPLATES):
    """The prompt of a caption in each template."""
    names = [ENTITIES.names[identity] for identity in ENTITIES.find(caption)]
    return [prompt(names, template) for template in templates]


def text_ids(caption, tokenizer):
    """Ids of the masked caption, and of the prompt in each template."""
    masked, *prompts = tokenizer.encode(
        [mask_entities(caption, ENTITIES), *prompts_of(caption)], SPEC["text_length"]
    )
    return masked, np.stack(prompts)
