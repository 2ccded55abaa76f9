"""Batches of NumPy arrays, through Grain. An example is a pure function of (seed, step, slot).

The record of a slot comes from `order.record_index`. Everything random about the example comes from
`order.example_rng(seed, epoch, key)`, drawn in this order: the caption if the record has several,
the prompt template, the partner (entity, then record), the view or the augmentation of the image,
that of the partner's image, the nouns, the entity that is masked. So cached and uncached texts use
the same caption and template, and cached and uncached images the same partner.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import Int32

from ovseg_jax.data import captions as texts
from ovseg_jax.data.augment import complete_transform, train_image
from ovseg_jax.data.captions import Masking
from ovseg_jax.data.decoding import UnreadableImage
from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.feature_store import FeatureStore
from ovseg_jax.data.order import example_rng, find_pairs, record_index
from ovseg_jax.data.records import MOST_NAMES, ClassCaptions, Record, RecordSource
from ovseg_jax.data.tokenizer import TRAINING_TEMPLATES, Tokenizer, unmasked
from ovseg_jax.errors import RestartError, UserError

Example = Batch = dict[str, np.ndarray]
_BATCHES_AHEAD = 2  # that wait ready for every reading thread
_log = logging.getLogger(__name__)


class Batches:
    """The batches of a range of steps at random access; `batches[i]` is step `first_step + i`.

    A batch is a dict of arrays with a leading axis for the slots. Of each slot it has:

      `image` uint8 [H, W, 3], or `image_features` [L, D] where images are cached;
      `caption_ids`, `masked_ids`, `prompt_ids` int32 [M], or where texts are cached
      `caption_pooled`, `prompt_pooled` [Dt], `masked_tokens` [M, Dt] and `masked_mask` bool [M];
      `weight`, `entity_weight` float32; `entity_set`, `record` int32;
      `data_set` int32, the number of the data set in a mixture;
      `caption_set` int32 [4], see `caption_set`;
      `truncated` bool, where texts are not cached: whether a text was cut to M tokens;
      with pairs `image2` or `image2_features`, `shared_ids` or `shared_pooled`, `pair_weight`;
      with nouns `noun_ids` int32 [n, M] and `noun_present` bool [n];
      `masked_targets` int32 [M], where masked tokens are classified.

    A record that cannot be read keeps its slot, with zeros, empty texts and weight 0.

    Args:
      source: the records. Their entity ids are found anew with `entity_set`.
      entity_set: the entities.
      tokenizer: not needed if `text_store` is given.
      spec: `text_length` (M), `transform` (see `augment.complete_transform`), `templates` (default:
        TRAINING_TEMPLATES), `nouns` (how many nouns of a caption become sentences; default 0),
        `masking` (see `captions.Masking`; default "all_entities").
      batch_size: the global batch size.
      seed: of the order and of everything random about an example.
      first_step, last_step: the range of steps; the last is excluded.
      first_position: the number of examples before `first_step`, if not all steps before it had
        this batch size.
      with_pairs: draw a second image that shares an entity (Sec. 3.2.3).
      slots: the slots of the global batch that this process reads; all of them by default.
      image_store, text_store: cached features, read in place of images and token ids.

    Attributes:
      slots: as above.
      failures: key -> cause of the records that weighed 0 so far, each logged once a process.

    Raises:
      UserError: there are no records, or the stores are of other data.
    """

    def __init__(
        self,
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
    ):
        self.slots = tuple(range(batch_size)) if slots is None else tuple(map(int, slots))
        if not len(source):
            raise UserError(f"the data set {source.name} has no records; check path and filters")
        self._source, self._entity_set, self._tokenizer = source, entity_set, tokenizer
        self._is_mixture = hasattr(source, "record_at")
        self._batch, self._seed = batch_size, seed
        self._start = first_step * batch_size if first_position is None else first_position
        self._steps = last_step - first_step
        self._images, self._texts = image_store, text_store
        self._templates = tuple(spec.get("templates") or TRAINING_TEMPLATES)
        self._masking = Masking(spec.get("masking", Masking.ALL_ENTITIES))
        self._nouns = int(spec.get("nouns", 0)) if text_store is None else 0
        self._length = 0 if text_store is not None else int(spec["text_length"])
        self._transform = {} if image_store is not None else complete_transform(spec["transform"])
        self._check_stores()
        self.failures: dict[str, str] = {}
        # With cached images no record is read: a step needs only some hundred bytes of one, which
        # are all read at once.
        self._without_images = None
        if image_store is not None:
            named = zip(source.keys(), source.captions(), strict=True)
            self._without_images = [Record(b"", captions, key) for key, captions in named]
        self._pairs = find_pairs(source, entity_set) if with_pairs else None
        self._name = "image" if image_store is None else "image_features"

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> Batch:
        # Stacked here and not by Grain, which measures every element that passes through it: for
        # small cached features that took longer than making them.
        first = self._start + int(step) * self._batch
        rows = [self._example_at(first + slot) for slot in self.slots]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def _example_at(self, position: int) -> Example:
        if self._is_mixture:
            epoch, at = self._source.record_at(self._seed, position)
        else:
            epoch, at = record_index(self._seed, len(self._source), position)
        try:
            record = self._record(at)
            example = self._example(at, record, example_rng(self._seed, epoch, record.key))
        except _Unusable as error:
            self._note(error)
            example = self._empty()
        data_set = self._source.part_of(at) if self._is_mixture else 0
        return {**example, "record": np.int32(at), "data_set": np.int32(data_set)}

    def _example(self, at: int, record: Record, rng: np.random.Generator) -> Example:
        count = len(record.captions)
        number = int(rng.integers(count)) if count > 1 else 0
        caption = unmasked(record.captions[number])
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            raise _Unusable(record.key, "the caption is not valid Unicode") from error
        entities = self._entity_set.find(caption)
        template = int(rng.integers(len(self._templates)))
        partner = shared = second = None
        if self._pairs is not None:
            partner, shared = self._pairs.partner(rng, at, entities)
        image = self._image(at, record, rng)
        if partner is not None:
            try:
                second = self._image(partner, self._record(partner), rng)
            except _Unusable as error:
                self._note(error)
                shared = None
        sentences = []
        if self._nouns:
            sentences = texts.noun_sentences(caption, self._nouns, self._templates, rng)
        if self._texts is not None:
            read, answer = self._cached_texts(at, number, template), entities
        else:
            masked = texts.masked_texts(
                caption, self._entity_set, self._templates[template], self._masking, rng
            )
            read, answer = self._ids(caption, masked.masked, masked.prompt), masked.answer
            read |= self._targets(read, masked.mentions)
        return {
            self._name: image,
            **read,
            **self._noun_ids(sentences),
            **self._pair(second, shared),
            "weight": np.float32(1),
            "entity_weight": np.float32(bool(answer)),
            "entity_set": np.int32(entity_set_hash(answer)),
            "caption_set": caption_set(record.captions, number),
        }

    def _empty(self) -> Example:
        """The example of a record that cannot be used."""
        if self._texts is not None:
            cached = self._cached_texts(0, 0, 0)
            read = {name: np.zeros_like(text) for name, text in cached.items()}
            # A visible token: attention over none at all would be 0/0.
            read["masked_mask"][0] = True
        else:
            read = self._ids("", "", "")
            read |= self._targets(read, ())
        return {
            self._name: self._no_image(),
            **read,
            **self._noun_ids([]),
            **self._pair(None, None),
            "weight": np.float32(0),
            "entity_weight": np.float32(0),
            "entity_set": np.int32(0),
            "caption_set": np.zeros(MOST_NAMES, np.int32),
        }

    def _record(self, at: int) -> Record:
        """The record, without its image if that is cached."""
        if self._without_images is not None:
            return self._without_images[at]
        try:
            return self._source[at]
        except Exception as error:
            # A damaged shard, a dead link: whatever the source raises concerns only this record.
            raise _Unusable(f"#{at}", f"{type(error).__name__}: {error}") from error

    def _image(self, at: int, record: Record, rng: np.random.Generator) -> np.ndarray:
        if self._images is None:
            try:
                return train_image(record.image, rng, self._transform)
            except UnreadableImage as error:
                raise _Unusable(record.key, str(error)) from error
        if "valid" in self._images and not self._images["valid"][at]:
            raise _Unusable(record.key, "unreadable when its features were computed")
        views = self._images["image"]
        return views[at, int(rng.integers(views.shape[1]))]

    def _no_image(self) -> np.ndarray:
        if self._images is not None:
            return np.zeros_like(self._images["image"][0, 0])
        return np.zeros((self._transform["size"],) * 2 + (3,), np.uint8)

    def _pair(self, second: np.ndarray | None, shared: int | None) -> Example:
        """The second image, and the sentence for the entity that it shares."""
        if self._pairs is None:
            return {}
        if self._texts is not None:
            table = self._texts["shared_pooled"]
            none = np.zeros(table.shape[1:], table.dtype)
            sentence = {"shared_pooled": none if shared is None else table[shared]}
        else:
            names = self._entity_set.names
            text = "" if shared is None else texts.shared_prompt(names[shared])
            sentence = {"shared_ids": self._encode([text])[0][0]}
        return {
            self._name.replace("image", "image2"): self._no_image() if second is None else second,
            "pair_weight": np.float32(second is not None),
            **sentence,
        }

    def _cached_texts(self, at: int, number: int, template: int) -> Example:
        """The features of caption `number` of a record."""
        store = self._texts
        row = store["caption_rows"][store["caption_starts"][at] + number]
        masked = store["masked_rows"][row]
        return {
            "caption_pooled": store["caption_pooled"][row],
            "masked_tokens": store["masked_tokens"][masked],
            "masked_mask": store["masked_mask"][masked].astype(bool),
            "prompt_pooled": store["prompt_pooled"][store["prompt_rows"][row, template]],
        }

    def _encode(self, sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return self._tokenizer.encode_with_cuts(sentences, self._length)

    def _ids(self, caption: str, masked: str, prompt: str) -> Example:
        (caption_ids, masked_ids, prompt_ids), cut = self._encode([caption, masked, prompt])
        ids = {"caption_ids": caption_ids, "masked_ids": masked_ids, "prompt_ids": prompt_ids}
        return {**ids, "truncated": cut.any()}

    def _targets(self, read: Example, mentions: tuple[int, ...] | None) -> Example:
        if not self._masking.classifies:
            return {}
        mask_id = self._tokenizer.mask_id
        return {"masked_targets": texts.token_targets(read["masked_ids"], mask_id, mentions)}

    def _noun_ids(self, sentences: list[str]) -> Example:
        if not self._nouns:
            return {}
        empty = [""] * (self._nouns - len(sentences))
        present = np.arange(self._nouns) < len(sentences)
        return {"noun_ids": self._encode(sentences + empty)[0], "noun_present": present}

    def _note(self, error: "_Unusable") -> None:
        key, cause = error.args
        if key not in self.failures:
            self.failures[key] = cause
            _log.warning("record %s cannot be used and weighs 0: %s", key, cause)

    def _check_stores(self) -> None:
        counts = {}
        if self._images is not None:
            counts["image"] = (len(self._images["image"]), len(self._source))
        if (stored := self._texts) is not None:
            counts["caption_starts"] = (len(stored["caption_starts"]) - 1, len(self._source))
            counts["prompt_rows"] = (stored["prompt_rows"].shape[1], len(self._templates))
            counts["shared_pooled"] = (len(stored["shared_pooled"]), len(self._entity_set))
        for name, (have, want) in counts.items():
            if have != want:
                wrong = f"the cached array {name} is for {have} and not for {want} of them"
                raise UserError(f"{wrong}; delete the cache folder to have it computed again")


class _Unusable(Exception):
    """A record that keeps its slot with weight 0; the arguments are its key and the cause."""


class Loader:
    """An iterable of batches, one a step, the same on any number of processes and workers.

    Every `iter` begins again at the first step. It raises RestartError when a worker process dies.

    Args:
      data, settings: of `Batches`, which says what a batch holds.
      workers: worker processes; 0 reads in threads of this process.
      threads: reading threads (of each worker), at most one where images and texts are cached; 0
        reads a batch when it is asked for.

    Attributes:
      failures: those of `Batches`, of this process only: worker processes log theirs as warnings,
        and `weight` shows them in the batch.
    """

    def __init__(self, *data: Any, workers: int = 0, threads: int = 4, **settings: Any):
        batches = Batches(*data, **settings)
        if settings.get("image_store") is not None and settings.get("text_store") is not None:
            # Nothing is decoded or tokenized, only copied: several threads, which mostly wait for
            # Python's lock, are slower than one (tests/bench/loader.py).
            threads = min(threads, 1)
        self._steps = len(batches)
        self.failures: Mapping[str, str] = batches.failures
        # Whole batches before the split among workers, who read them in turn; an IterDataset
        # batched after it would lose the ends of each worker's share.
        options = grain.ReadOptions(threads, prefetch_buffer_size=_BATCHES_AHEAD * threads)
        dataset = grain.MapDataset.source(batches).to_iter_dataset(options)
        if workers:
            if not flags.FLAGS.is_parsed():
                # Grain reads its absl flags when it starts a worker, also in programs and notebooks
                # that parse none.
                flags.FLAGS.mark_as_parsed()
            processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
            dataset = dataset.mp_prefetch(processes)
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
            cause = "a worker process that reads data was killed, perhaps for want of memory"
            raise RestartError(f"{cause} (see config.data.workers): {error}") from None
        finally:
            # Stops worker processes at once, not when the garbage collector runs.
            iterator.close()


def entity_set_hash(entities: Sequence[int | str]) -> int:
    """An int32, equal for equal sets of entities or words on every machine; 0 for none."""
    return _text_hash(",".join(map(str, sorted(set(entities))))) if entities else 0


def caption_set(captions: Sequence[str], number: int) -> Int32[np.ndarray, "4"]:
    """Hashes of what describes an image: its drawn caption `number`; of a class, its names.

    The drawn text, or name, comes first. It is right for another example if its hash is among the
    other's: two photographs of a class, whatever templates were drawn, and a horse beside another
    breed of it.
    """
    names = (captions[number],)
    if isinstance(captions, ClassCaptions):
        drawn = captions.name_in(number)
        names = (drawn, *(name for name in captions.names if name != drawn))[:MOST_NAMES]
    hashes = [_text_hash(name) for name in names]
    return np.asarray(hashes + hashes[:1] * (MOST_NAMES - len(hashes)), np.int32)


def _text_hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little", signed=True) or 1
