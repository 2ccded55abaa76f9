"""One example of a batch: a pure function of (seed, step, slot).

The record of a slot comes from `record_index`. Everything random about the example comes from
`example_rng(seed, epoch, key)`, drawn in this order: the caption where the record has several, the
prompt template, the partner (entity, then record), the view or the augmentation of the image, that
of the partner's image, the nouns, the entity that is masked. So cached and uncached texts use the
same caption and template, and cached and uncached images the same partner. The partner shares an
entity of the drawn caption, which any of its own captions may name.
"""

import hashlib
import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from ovseg_jax.data.augment import complete_transform, train_image
from ovseg_jax.data.caption_filter import CaptionFilter
from ovseg_jax.data.captions import shared_prompt
from ovseg_jax.data.decoding import UnreadableImage
from ovseg_jax.data.entities import EntitySet, unmasked
from ovseg_jax.data.feature_store import FeatureStore
from ovseg_jax.data.masking import Masking, masked_texts, token_targets
from ovseg_jax.data.mixture import Mixture, MixturePairs
from ovseg_jax.data.noun_texts import noun_sentences
from ovseg_jax.data.order import example_rng, record_index
from ovseg_jax.data.pairs import PairIndex
from ovseg_jax.data.partners import find_pairs
from ovseg_jax.data.records import ClassCaptions, Record, RecordSource, keys_of
from ovseg_jax.data.templates import TRAINING
from ovseg_jax.data.tokenizer import Tokenizer
from ovseg_jax.errors import UserError

Example = dict[str, np.ndarray]
# Names of a class that are told apart in `caption_set`; `ovseg_jax.prepare` gives no more.
MOST_NAMES = 4
_log = logging.getLogger(__name__)


def entity_set_hash(entities: Sequence[int | str]) -> int:
    """An int32, equal for equal sets of entities or words on every machine; 0 for none."""
    return _text_hash(",".join(map(str, sorted(set(entities))))) if entities else 0


def caption_set(captions: Sequence[str], number: int) -> Int32[np.ndarray, "4"]:
    """Hashes of what describes an image: its drawn caption; of a class, the drawn name first.

    The drawn text of one example is right for another where its hash is among the other's: two
    photographs of a class, whatever templates were drawn, and a horse beside another breed of it.

    Args:
      captions: of the record. number: which of them was drawn.
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


class Failures:
    """Records that could not be read: key -> cause. Each key is logged once a process."""

    def __init__(self) -> None:
        self.causes: dict[str, str] = {}
        self._lock = threading.Lock()

    def add(self, key: str, cause: str) -> None:
        with self._lock:
            if key in self.causes:
                return
            self.causes[key] = cause
        _log.warning("record %s cannot be used and weighs 0: %s", key, cause)

    def __getstate__(self) -> dict[str, Any]:
        return {"causes": dict(self.causes)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.causes = state["causes"]
        self._lock = threading.Lock()


class Examples:
    """The examples of a range of steps at random access, step after step, slot after slot.

    `examples[i]` is slot `slots[i % len(slots)]` of step `first_step + i // len(slots)`, as a
    dict of arrays without the batch axis. Arguments are those of `pipeline.make_loader`.

    Raises:
      UserError: the settings do not fit each other or the stores.
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
        slots: Sequence[int] | None,
        image_store: FeatureStore | None,
        text_store: FeatureStore | None,
        pairs: PairIndex | MixturePairs | None,
    ):
        self._slots = tuple(range(batch_size)) if slots is None else tuple(map(int, slots))
        if not self._slots or not all(0 <= slot < batch_size for slot in self._slots):
            raise UserError(f"the slots {self._slots} must be some of 0..{batch_size - 1}")
        if last_step < first_step:
            raise UserError(f"last_step {last_step} comes before first_step {first_step}")
        if not len(source):
            raise UserError(f"the data set {source.name} has no records; check path and filters")
        self._source, self._entity_set, self._tokenizer = source, entity_set, tokenizer
        self._batch, self._seed, self._with_pairs = batch_size, seed, with_pairs
        self._start = first_step * batch_size if first_position is None else first_position
        self._steps = last_step - first_step
        self._images, self._texts = image_store, text_store
        self._templates = tuple(spec.get("templates") or TRAINING)
        self._masking = Masking(spec.get("masking", Masking.ALL_ENTITIES))
        self._nouns = int(spec.get("nouns", 0)) if text_store is None else 0
        self._length = 0 if text_store is not None else int(_need(spec, "text_length"))
        self._transform = (
            {} if image_store is not None else complete_transform(_need(spec, "transform"))
        )
        if text_store is None and tokenizer is None:
            raise UserError("texts that are not cached need a tokenizer; give one")
        self._check_stores()
        self.failures = Failures()
        # With cached images no record is read at all: what steps need of one, some hundred bytes
        # beside features of as many kilobytes, is fetched at once.
        self._brief = None if image_store is None else _brief_records(source)
        self._entities = CaptionFilter(entity_set)
        self._pairs = find_pairs(source, entity_set) if with_pairs and pairs is None else pairs

    def __len__(self) -> int:
        return self._steps * len(self._slots)

    def __getitem__(self, position: int) -> Example:
        step, column = divmod(int(position), len(self._slots))
        epoch, index = self._place(self._start + step * self._batch + self._slots[column])
        try:
            record = self._record(index)
            rng = example_rng(self._seed, epoch, record.key)
            return self._example(index, record, rng)
        except _Unusable as error:
            self.failures.add(error.key, error.cause)
            return self._assemble(index, None)

    def _place(self, position: int) -> tuple[int, int]:
        """(epoch, record index) of a position in the order."""
        if isinstance(self._source, Mixture):
            return self._source.record_at(self._seed, position)
        return record_index(self._seed, len(self._source), position)

    def _example(self, index: int, record: Record, rng: np.random.Generator) -> Example:
        several = len(record.captions) > 1
        number = int(rng.integers(len(record.captions))) if several else 0
        caption = unmasked(record.captions[number])
        _check_text(record.key, caption)
        entities = self._entities.find(caption)
        template = int(rng.integers(len(self._templates)))
        partner = shared = None
        if self._with_pairs and self._pairs is not None:
            partner, shared = self._pairs.partner(rng, index, entities)
        image = self._image(index, record, rng)
        second = None
        if partner is not None:
            try:
                second = self._image(partner, self._record(partner), rng)
            except _Unusable as error:
                self.failures.add(error.key, error.cause)
                shared = None
        nouns = {}
        if self._nouns:
            sentences = noun_sentences(caption, self._nouns, self._templates, rng)
            nouns = self._noun_ids(sentences)
        texts, answer = self._text(index, number, caption, entities, template, rng)
        texts["caption_set"] = caption_set(record.captions, number)
        return self._assemble(index, (image, second, texts | nouns, answer), shared)

    def _assemble(
        self,
        index: int,
        parts: tuple[np.ndarray, np.ndarray | None, Example, tuple[int | str, ...]] | None,
        shared: int | None = None,
    ) -> Example:
        """Puts an example together; zeros and empty texts where `parts` is None."""
        image, second, texts, answer = parts or (None, None, self._no_text(), ())
        name = "image" if self._images is None else "image_features"
        example = {name: self._no_image() if image is None else image, **texts}
        example["weight"] = np.float32(parts is not None)
        example["entity_weight"] = np.float32(bool(answer))
        example["entity_set"] = np.int32(entity_set_hash(answer))
        example["record"] = np.int32(index)
        example.setdefault("caption_set", np.zeros(MOST_NAMES, np.int32))
        if self._with_pairs:
            example[name.replace("image", "image2")] = (
                self._no_image() if second is None else second
            )
            example["pair_weight"] = np.float32(second is not None)
            example.update(self._shared_text(shared))
        return example

    def _record(self, index: int) -> Record:
        """The record, without an image if it is cached."""
        if self._brief is not None:
            return self._brief[index]
        try:
            return self._source[index]
        except Exception as error:
            # A damaged shard, a dead link: whatever the source raises concerns this record only.
            raise _Unusable(f"#{index}", f"{type(error).__name__}: {error}") from error

    def _image(self, index: int, record: Record, rng: np.random.Generator) -> np.ndarray:
        if self._images is None:
            try:
                return train_image(record.image, rng, self._transform)
            except UnreadableImage as error:
                raise _Unusable(record.key, str(error)) from error
        if "valid" in self._images and not self._images["valid"][index]:
            raise _Unusable(record.key, "unreadable when its features were computed")
        views = self._images["image"]
        return views[index, int(rng.integers(views.shape[1]))]

    def _no_image(self) -> np.ndarray:
        if self._images is None:
            size = self._transform["size"]
            return np.zeros((size, size, 3), np.uint8)
        views = self._images["image"]
        return np.zeros(views.shape[2:], views.dtype)

    def _text(
        self,
        index: int,
        number: int,
        caption: str,
        entities: tuple[int, ...],
        template: int,
        rng: np.random.Generator,
    ) -> tuple[Example, tuple[int | str, ...]]:
        """The texts of caption `number` of a record, and what is masked in them."""
        store = self._texts
        if store is not None:
            row = store["caption_rows"][store["caption_starts"][index] + number]
            masked = store["masked_rows"][row]
            cached = {
                "caption_pooled": store["caption_pooled"][row],
                "masked_tokens": store["masked_tokens"][masked],
                "masked_mask": store["masked_mask"][masked].astype(bool),
                "prompt_pooled": store["prompt_pooled"][store["prompt_rows"][row, template]],
            }
            return cached, entities
        texts = masked_texts(
            caption, self._entity_set, self._templates[template], self._masking, rng
        )
        found = self._encode(caption, texts.masked, texts.prompt)
        if self._masking.classifies:
            found |= self._targets(found, texts.mentions)
        return found, texts.answer

    def _no_text(self) -> Example:
        if self._texts is None:
            empty = self._encode("", "", "")
            if self._masking.classifies:
                empty |= self._targets(empty, ())
            return empty | (self._noun_ids([]) if self._nouns else {})
        tokens = self._texts["masked_tokens"]
        width = self._texts["caption_pooled"].shape[-1]
        mask = np.zeros(tokens.shape[1], bool)
        # One visible token: attention over none at all would be 0/0.
        mask[0] = True
        return {
            "caption_pooled": np.zeros(width, self._texts["caption_pooled"].dtype),
            "masked_tokens": np.zeros(tokens.shape[1:], tokens.dtype),
            "masked_mask": mask,
            "prompt_pooled": np.zeros(width, self._texts["prompt_pooled"].dtype),
        }

    def _encode(self, caption: str, masked: str, prompt: str) -> Example:
        assert self._tokenizer is not None
        ids, cut = self._tokenizer.encode_with_cuts([caption, masked, prompt], self._length)
        return {
            "caption_ids": ids[0],
            "masked_ids": ids[1],
            "prompt_ids": ids[2],
            "truncated": cut.any(),
        }

    def _targets(self, texts: Example, mentions: tuple[int, ...] | None) -> Example:
        assert self._tokenizer is not None
        return {
            "masked_targets": token_targets(texts["masked_ids"], self._tokenizer.mask_id, mentions)
        }

    def _noun_ids(self, sentences: list[str]) -> Example:
        assert self._tokenizer is not None
        empty = [""] * (self._nouns - len(sentences))
        return {
            "noun_ids": self._tokenizer.encode(sentences + empty, self._length),
            "noun_present": np.arange(self._nouns) < len(sentences),
        }

    def _shared_text(self, shared: int | None) -> Example:
        if self._texts is not None:
            table = self._texts["shared_pooled"]
            empty = np.zeros(table.shape[1:], table.dtype)
            return {"shared_pooled": empty if shared is None else table[shared]}
        assert self._tokenizer is not None
        text = "" if shared is None else shared_prompt(self._entity_set.names[shared])
        return {"shared_ids": self._tokenizer.encode([text], self._length)[0]}

    def _check_stores(self) -> None:
        again = "delete the cache folder to have it computed again"
        counts = []
        if self._images is not None:
            counts.append(("image", self._images["image"].shape[0], len(self._source), "records"))
        if self._texts is not None:
            records = len(self._texts["caption_starts"]) - 1
            counts.append(("caption_starts", records, len(self._source), "records"))
            templates = self._texts["prompt_rows"].shape[1]
            counts.append(("prompt_rows", templates, len(self._templates), "templates"))
            shared = self._texts["shared_pooled"].shape[0]
            counts.append(("shared_pooled", shared, len(self._entity_set), "entities"))
        for name, have, want, what in counts:
            if have != want:
                raise UserError(
                    f"the cached array {name} has {have} {what}, the data set has {want}; {again}"
                )


def _brief_records(source: RecordSource) -> list[Record]:
    """All records without their images."""
    return [
        Record(b"", captions, key)
        for key, captions in zip(keys_of(source), source.captions(), strict=True)
    ]


def _check_text(key: str, caption: str) -> None:
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise _Unusable(key, "the caption is not valid Unicode") from error


class _Unusable(Exception):
    """A record that keeps its slot with weight 0."""

    def __init__(self, key: str, cause: str):
        super().__init__(key, cause)
        self.key, self.cause = key, cause


def _need(spec: Mapping[str, Any], name: str) -> Any:
    if name not in spec:
        raise UserError(f"the data settings lack {name!r}; they have {', '.join(spec)}")
    return spec[name]
