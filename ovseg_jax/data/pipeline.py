"""Batches of NumPy arrays, through Grain: the same on any number of processes and workers."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import Int32

from ovseg_jax.data.captions import distinct_prompts, texts_of
from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.examples import Examples, entity_set_hash
from ovseg_jax.data.feature_store import FeatureStore
from ovseg_jax.data.mixture import MixturePairs
from ovseg_jax.data.pairs import PairIndex
from ovseg_jax.data.records import RecordSource
from ovseg_jax.data.templates import TRAINING
from ovseg_jax.data.tokenizer import Tokenizer
from ovseg_jax.errors import RestartError

__all__ = [
    "Loader",
    "distinct_prompts",
    "encode_caption_texts",
    "entity_set_hash",
    "make_loader",
    "texts_of",
]

Batch = dict[str, np.ndarray]
# Batches that wait ready for every reading thread.
_BATCHES_AHEAD = 2


class _Batches:
    """The batches of `examples` at random access, `slots` examples each.

    Stacked here and not by Grain, which measures every element that passes through it: for small
    cached features that took longer than making them.
    """

    def __init__(self, examples: Examples, slots: int):
        self._examples, self._slots = examples, slots

    def __len__(self) -> int:
        return len(self._examples) // self._slots

    def __getitem__(self, step: int) -> Batch:
        first = int(step) * self._slots
        rows = [self._examples[first + column] for column in range(self._slots)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class Loader:
    """An iterable of batches, one a step. Every `iter` begins again at the first step.

    Iterating raises RestartError when a worker process dies.

    Attributes:
      failures: key -> cause of the records that weighed 0 so far. Filled in this process only:
        worker processes log theirs as warnings, and `weight` shows them in the batch.
    """

    def __init__(self, examples: Examples, slots: int, workers: int, threads: int):
        batches = _Batches(examples, slots)
        self._steps = len(batches)
        self.failures: Mapping[str, str] = examples.failures.causes
        # Whole batches before the split among workers, who take them in turn; an IterDataset
        # batched there would lose the ends of each worker's share.
        dataset = grain.MapDataset.source(batches).to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=_BATCHES_AHEAD * threads)
        )
        if workers:
            if not flags.FLAGS.is_parsed():
                # Grain reads absl flags of its own when it starts a worker, also in programs and
                # notebooks that parse none.
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
            dataset = dataset.mp_prefetch(options)
        self._dataset = dataset

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Batch]:
        if not self._steps:
            return
        iterator = iter(self._dataset)
        try:
            yield from iterator
        except RuntimeError as error:
            if "Worker process was terminated" not in str(error):
                raise
            raise RestartError(
                "a worker process that reads data was killed, perhaps for want of memory "
                f"(config.data.workers asks for several): {error}"
            ) from None
        finally:
            # Stops worker processes at once, not whenever the garbage collector comes by.
            iterator.close()


def make_loader(
    source: RecordSource,
    entity_set: EntitySet,
    tokenizer: Tokenizer | None,
    spec: Mapping[str, Any],
    *,
    batch_size: int,
    seed: int,
    first_step: int,
    last_step: int,
    first_position: int | None = None,
    with_pairs: bool,
    slots: Sequence[int] | None = None,
    image_store: FeatureStore | None = None,
    text_store: FeatureStore | None = None,
    pairs: PairIndex | MixturePairs | None = None,
    workers: int = 0,
    threads: int = 4,
) -> Loader:
    """The batches of steps `first_step` to `last_step` (exclusive).

    Each batch is a flat dict with leading axis b = len(slots): `image` uint8 [b, H, W, 3] or
    `image_features` [b, L, D]; `caption_ids`, `masked_ids`, `prompt_ids` int32 [b, M] or
    `caption_pooled`, `prompt_pooled` [b, Dt], `masked_tokens` [b, M, Dt], `masked_mask` bool
    [b, M]; `weight`, `entity_weight` float32 [b]; `entity_set`, `record` int32 [b]; `caption_set`
    int32 [b, 4] (`examples.caption_set`). Where texts are not cached also `truncated` bool [b]: the
    caption, its masked form or the prompt was cut to M tokens. With pairs also `image2` or
    `image2_features`, `shared_ids` or `shared_pooled`, `pair_weight`. With nouns also `noun_ids`
    int32 [b, n, M] and `noun_present` bool [b, n]; where masked tokens are classified also
    `masked_targets` int32 [b, M].

    A record that cannot be read keeps its slot: zeros, empty texts, weight 0.

    Args:
      source: the records. Their entity ids are found anew with `entity_set`.
      entity_set: the entities.
      tokenizer: not needed when `text_store` is given.
      spec: `text_length` (M), `transform` (see `augment.complete_transform`), `templates` (default:
        `templates.TRAINING`), `nouns` (how many nouns of a caption become sentences; default 0),
        `masking` (see `masking.Masking`; default "all_entities").
      batch_size: the global batch size B.
      seed: of the order and of everything random about an example.
      first_position: how many examples came before `first_step`, where not all of them came in
        batches of this size.
      with_pairs: draw a second image that shares an entity (Sec. 3.2.3).
      slots: the slots of the global batch that this process reads; all of them by default.
      image_store: cached image features, read in place of images.
      text_store: cached text features, read in place of token ids.
      pairs: the entity -> records index, if it was made already.
      workers: worker processes; 0 reads in threads of this process.
      threads: reading threads (of each worker), one at most where images and texts are cached; 0
        reads when a batch is asked for.

    Raises:
      UserError: the settings do not fit each other or the stores.
    """
    examples = Examples(
        source,
        entity_set,
        tokenizer,
        spec,
        batch_size=batch_size,
        seed=seed,
        first_step=first_step,
        last_step=last_step,
        first_position=first_position,
        with_pairs=with_pairs,
        slots=slots,
        image_store=image_store,
        text_store=text_store,
        pairs=pairs,
    )
    if image_store is not None and text_store is not None:
        # Nothing is decoded or tokenized, only copied, and several threads that do little else
        # than wait for Python's lock are slower than one (tests/bench/loader.py).
        threads = min(threads, 1)
    return Loader(examples, batch_size if slots is None else len(slots), workers, threads)


def encode_caption_texts(
    caption: str, entity_set: EntitySet, tokenizer: Tokenizer, spec: Mapping[str, Any]
) -> dict[str, Int32[np.ndarray, "..."]]:
    """The token ids of every text of a caption, as the loader would make them.

    Returns:
      `caption_ids` [M], `masked_ids` [M], `prompt_ids` [T, M], one row a template.
    """
    texts = texts_of(caption, entity_set, spec.get("templates") or TRAINING)
    ids = tokenizer.encode(
        [texts["caption"], texts["masked"], *texts["prompts"]], spec["text_length"]
    )
    return {"caption_ids": ids[0], "masked_ids": ids[1], "prompt_ids": ids[2:]}
