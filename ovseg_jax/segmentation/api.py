"""A model directory as an object that segments images: what `ovseg_jax.load` gives."""

import functools
import numbers
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.labels import class_probabilities, label_maps
from ovseg_jax.segmentation.pictures import AnyImage, read_image
from ovseg_jax.segmentation.protocol import Protocol, saved_protocol
from ovseg_jax.segmentation.readout import resize_image
from ovseg_jax.segmentation.scores import ImageScores, ModelSegmenter, image_scores, with_scale
from ovseg_jax.segmentation.vocabulary import BACKGROUND, Vocabulary, competition, ordered
from ovseg_jax.weights.model_dir import load_model


@dataclass(frozen=True)
class Segmentation:
    """The result for one image.

    Attributes:
      labels: at the size of the image: 0 is background, 1 + i the i-th class.
      classes: their names; for a class with synonyms its first word.
      scores: the highest probability of each class in the image, 0 to 1, among competing words.
      competitors: words that stand for the background; pixels that they win are background.
      protocol: how the labels were made, with the threshold that was used.
      parts: the scores that the labels were made from, window by window.
    """

    labels: Int[np.ndarray, "H W"]
    classes: tuple[str, ...]
    scores: Float[np.ndarray, "C"]
    competitors: tuple[str, ...] = field(repr=False)
    protocol: Protocol = field(repr=False)
    parts: ImageScores = field(repr=False, compare=False)

    @functools.cached_property
    def areas(self) -> Float[np.ndarray, "C"]:
        """Share of the image that each class takes, 0 to 1."""
        counts = np.bincount(self.labels.reshape(-1), minlength=1 + len(self.classes))
        return counts[1:] / self.labels.size

    @property
    def groups(self) -> Int[np.ndarray, "H W"]:
        """The group of each pixel, see `ImageScores.group_map`: each window has its own groups."""
        return self.parts.group_map()


class LoadedModel:
    """A trained model with its tokenizer and the protocol that it was calibrated for; see
    `ovseg_jax.load`. `info` is what the model directory's config.json says."""

    def __init__(self, directory: str | os.PathLike, **settings: Any):
        saved = load_model(directory)
        self.info = saved.info
        protocol = Protocol.from_config({**saved_protocol(saved.info).as_dict(), **settings})
        self._segmenter = ModelSegmenter.of_saved(saved, protocol)
        self.protocol = with_scale(protocol, self._segmenter)

    def segment(
        self, images: AnyImage | Iterable[AnyImage], classes: Iterable[str], **options: Any
    ) -> Segmentation | list[Segmentation]:
        """Gives every pixel of an image a class, or background: a result, or a list of results in
        the order of the images.

        Args:
          images: a path, a PIL image, or uint8 [H, W, 3] RGB (or [H, W] gray) of NumPy or JAX, of
            any size; or a list of those, or uint8 [B, H, W, 3].
          classes: names in plain words, such as ["cat", "fire hydrant"], in order; synonyms of one
            class between bars, "cat|kitten|tabby".
          options: background, threshold, words and batch_size, see `segment_each`.

        Raises:
          UserError: no image, one that cannot be read, or a bad list of classes.
        """
        many, images = _as_list(images)
        results = dict(self.segment_each(images, classes, **options))
        return [results[i] for i in range(len(results))] if many else results[0]

    def segment_each(
        self,
        images: Iterable[AnyImage],
        classes: Iterable[str],
        *,
        background: bool | Iterable[str] = True,
        threshold: float | None = None,
        words: int = 0,
        batch_size: int = 0,
    ) -> Iterator[tuple[int, Segmentation]]:
        """(position, result) of each image as it is done, not always in order; see `segment`.

        Args:
          background: whether pixels may belong to none of the classes; or a list of words: pixels
            that one of them wins are background.
          threshold: a pixel whose best probability is lower is background; by default the
            protocol's, or 0 with words for the background.
          words: words that compete in all; up to it everyday words are added (not to a list for
            the background), and what they win becomes background. 0: as in calibration.
          batch_size: windows encoded at once; 0 chooses a number for the devices.
        """
        _check_options(background, threshold, words)
        vocabulary, protocol = self._competition(classes, background, threshold, words)
        size, images = self._whole_batch(batch_size), map(read_image, images)
        scored = image_scores(self._segmenter, vocabulary, images, protocol, size)
        of_words, count = np.array(vocabulary.word_to_class), len(vocabulary.classes)
        for scored_image, labels in label_maps(scored, protocol, vocabulary.word_to_class, group=1):
            p = class_probabilities(scored_image, protocol).reshape(-1, len(of_words)).max(axis=0)
            best = np.zeros(count + 1, np.float32)
            np.maximum.at(best, of_words, p)  # those of the background, -1, come last
            # Without background, labels count the classes from 0.
            shifted = labels if protocol.threshold is not None else labels + 1
            result = Segmentation(
                labels=shifted.astype(np.int32, copy=False),
                classes=vocabulary.classes,
                scores=best[:count],
                competitors=vocabulary.words_of(BACKGROUND),
                protocol=protocol,
                parts=scored_image,
            )
            yield scored_image.index, result

    def embed_image(
        self, images: AnyImage | Iterable[AnyImage], batch_size: int = 0
    ) -> Float[np.ndarray, "N E"]:
        """Unit embeddings of whole images (see `segment`), to be compared with those of
        `embed_text`: of the square in the middle, as large as the protocol's window."""
        _, images = _as_list(images)
        size, rows = self._whole_batch(batch_size), []
        squares = np.stack([_middle(read_image(x), self.protocol.window) for x in images])
        padded = np.pad(squares, ((0, -len(squares) % size), (0, 0), (0, 0), (0, 0)))
        for start in range(0, len(squares), size):
            rows.append(np.asarray(self._segmenter.encode(padded[start : start + size])[2]))
        embeddings = np.concatenate(rows)[: len(squares)].astype(np.float32)
        return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)

    def embed_text(
        self, texts: Iterable[str], templates: Sequence[str] | None = None
    ) -> Float[np.ndarray, "N E"]:
        """Unit embeddings of class names, averaged over templates (the protocol's by default), each
        with {} for the name; ("{}",) for whole sentences."""
        texts = ordered(texts, "texts")
        if not texts or not all(text.strip() for text in texts):
            raise UserError("texts is a list of at least one text, none of them empty")
        templates = self.protocol.templates if templates is None else templates
        protocol = self.protocol.replace(templates=tuple(ordered(templates, "templates")))
        return self._segmenter.text(texts, protocol.templates)[1]

    def _whole_batch(self, batch_size: int) -> int:
        if not isinstance(batch_size, numbers.Integral) or batch_size < 0:
            raise UserError(f"batch_size is {batch_size!r}; it must be at least 0, 0 to choose one")
        return self._segmenter.whole_batch(batch_size)

    def _competition(self, classes, background, threshold, words) -> tuple[Vocabulary, Protocol]:
        """The words that compete for a pixel, and the protocol with its threshold."""
        if background is False:
            return Vocabulary.of(classes), self.protocol.replace(threshold=None, thresholds={})
        if background is True:
            protocol = self.protocol.for_list_of_classes()
            protocol = protocol.replace(competing_words=words or protocol.competing_words)
            competing = protocol.replace(threshold=protocol.threshold or 0.0)
            vocabulary = competition(Vocabulary.of(classes), competing)
            if threshold is None:
                threshold = protocol.threshold_for(len(vocabulary.words))
        else:
            vocabulary = Vocabulary.of(classes, background)
        # The threshold is that of these words: nothing is left to adapt.
        fields = {"threshold": float(threshold or 0.0), "competing_words": 0}
        return vocabulary, self.protocol.replace(**fields)


def _check_options(background: Any, threshold: Any, words: Any) -> None:
    """Raises UserError for options that `LoadedModel.segment` cannot take."""
    if isinstance(background, numbers.Number) and not isinstance(background, bool):
        raise UserError(f"background is not {background!r}: a least probability is the threshold")
    if not isinstance(background, bool) and not ordered(background, "background"):
        raise UserError("background is True, False, or a list of at least one word for it")
    real = isinstance(threshold, numbers.Real) and not isinstance(threshold, bool)
    if threshold is not None and not (real and 0 <= threshold <= 1):
        raise UserError(f"threshold is a probability, or None for the model's; not {threshold!r}")
    if not isinstance(words, numbers.Integral) or isinstance(words, bool) or words < 0:
        raise UserError(f"words is {words!r}; it must be at least 1, or 0 for as in calibration")


def _as_list(images: AnyImage | Iterable[AnyImage]) -> tuple[bool, list[AnyImage]]:
    """(whether several images were given, the images)."""
    if isinstance(images, Iterator | Set | Mapping):
        kind = type(images).__name__
        raise UserError(f"images is a list, not a {kind}, which `segment_each` takes")
    many = isinstance(images, Sequence) and not isinstance(images, str | bytes)
    if not many and getattr(images, "ndim", 0) != 4:
        return False, [images]
    if not len(images):
        raise UserError("no images: give at least one")
    return True, list(images)


def _middle(image: np.ndarray, side: int) -> np.ndarray:
    """The square in the middle of the image, [side, side, 3]."""
    factor = side / min(image.shape[:2])
    h, w = (max(side, round(length * factor)) for length in image.shape[:2])
    top, left = (h - side) // 2, (w - side) // 2
    return resize_image(image, h, w)[top : top + side, left : left + side]
