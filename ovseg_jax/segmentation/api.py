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
from ovseg_jax.segmentation.inputs import AnyImage, read_image
from ovseg_jax.segmentation.labels import class_probabilities, label_maps
from ovseg_jax.segmentation.protocol import Protocol, saved_protocol
from ovseg_jax.segmentation.scores import ImageScores, image_scores, with_scale
from ovseg_jax.segmentation.segmenter import ModelSegmenter
from ovseg_jax.segmentation.vocabulary import BACKGROUND, Vocabulary, competition, ordered
from ovseg_jax.segmentation.windows import resize_image
from ovseg_jax.weights.model_dir import load_model

# Lists of classes whose embeddings are kept.
REMEMBERED = 16


@dataclass(frozen=True)
class Segmentation:
    """The result for one image.

    Attributes:
      labels: at the size of the image: 0 is background, 1 + i the i-th class.
      classes: their names; for a class with synonyms its first word.
      scores: of each class, its highest probability anywhere in the image, 0 to 1. Probabilities
        compare the words that compete, so they depend on the list of classes.
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
        """The group of each pixel. Each window has its own groups: with K groups, those of window n
        count from n K, and a pixel in several windows has its group in the first of them."""
        return self.parts.group_map()


class LoadedModel:
    """A trained model with its tokenizer and the protocol it was calibrated for.

    Attributes:
      protocol: how label maps are made.
      info: what the model directory's config.json says, provenance included.

    Args:
      directory: the model directory, or the name of a model that comes with this package.
      settings: fields of the protocol (`segmentation.protocol.Protocol`) that are to differ, such
        as ``pamr_steps=10``.
    """

    def __init__(self, directory: str | os.PathLike, **settings: Any):
        saved = load_model(directory)
        self.info = saved.info
        protocol = Protocol.from_config({**saved_protocol(saved.info).as_dict(), **settings})
        self._segmenter = ModelSegmenter.of_saved(saved, protocol)
        self.protocol = with_scale(protocol, self._segmenter)
        self._embeddings: dict[tuple[str, ...], tuple[np.ndarray, np.ndarray]] = {}

    def segment(
        self,
        images: AnyImage | Iterable[AnyImage],
        classes: Iterable[str],
        *,
        background: bool | Iterable[str] = True,
        threshold: float | None = None,
        words: int = 0,
        batch_size: int = 0,
    ) -> Segmentation | list[Segmentation]:
        """Gives every pixel of an image a class, or background.

        Args:
          images: a path, a PIL image, or uint8 [H, W, 3] RGB (or [H, W] gray) of NumPy or JAX, of
            any size; or a list of those, or uint8 [B, H, W, 3].
          classes: names in plain words, such as ["cat", "fire hydrant"]; synonyms of one class
            between bars, "cat|kitten|tabby". Any sequence that has an order. Names that the text
            encoder cannot tell apart are logged.
          background: whether pixels may belong to none of the classes. Without, every pixel gets
            the best class. A list of words instead: pixels that one of them wins are background.
          threshold: a pixel whose best probability is lower is background; by default the
            protocol's, or 0 where words for the background are given.
          words: words that compete in all; with fewer classes everyday words are added, and what
            they win becomes background. 0: as many as in the model's calibration. Not used where
            words for the background are given.
          batch_size: windows encoded at once; the encoder is compiled for each number. 0 chooses
            one for the devices.

        Returns:
          A result, or a list of results in the order of the images.

        Raises:
          UserError: no image, one that cannot be read, or a bad list of classes.
        """
        many, images = _as_list(images)
        options = {"background": background, "threshold": threshold, "words": words}
        results = dict(self.segment_each(images, classes, **options, batch_size=batch_size))
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
          images: read as they are needed.
        """
        _check_options(background, threshold, words)
        vocabulary, protocol = self._competition(classes, background, threshold, words)
        scored = image_scores(
            self._segmenter.encode,
            self._text(vocabulary.words),
            (read_image(image) for image in images),
            protocol,
            batch_size=self._whole_batch(batch_size),
            things=vocabulary.things,
        )
        classes_of_words = np.array(vocabulary.word_to_class)
        is_class = classes_of_words != BACKGROUND
        for scored_image, labels in label_maps(scored, protocol, vocabulary.word_to_class, group=1):
            p = class_probabilities(scored_image, protocol).reshape(-1, len(is_class)).max(axis=0)
            best = np.zeros(len(vocabulary.classes), np.float32)
            np.maximum.at(best, classes_of_words[is_class], p[is_class])
            # Without background, labels count the classes from 0.
            shifted = labels if protocol.threshold is not None else labels + 1
            yield (
                scored_image.index,
                Segmentation(
                    labels=shifted.astype(np.int32, copy=False),
                    classes=vocabulary.classes,
                    scores=best,
                    competitors=vocabulary.background_words,
                    protocol=protocol,
                    parts=scored_image,
                ),
            )

    def embed_image(
        self, images: AnyImage | Iterable[AnyImage], batch_size: int = 0
    ) -> Float[np.ndarray, "N E"]:
        """Unit embeddings of whole images, to be compared with those of `embed_text`.

        Each image is seen once: its short side is brought to the protocol's window, and the square
        in its middle is taken.

        Args:
          images, batch_size: see `segment`; a single image gives one row.

        Raises:
          UserError: no image, or one that cannot be read.
        """
        _, images = _as_list(images)
        side, rows = self.protocol.window, []
        size = self._whole_batch(batch_size)
        squares = [_middle(read_image(x), side) for x in images]
        for start in range(0, len(squares), size):
            part = np.stack(squares[start : start + size])
            padded = np.pad(part, ((0, size - len(part)), (0, 0), (0, 0), (0, 0)))
            rows.append(np.asarray(self._segmenter.encode(padded)[2])[: len(part)])
        embeddings = np.concatenate(rows).astype(np.float32)
        return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)

    def embed_text(
        self, texts: Iterable[str], templates: Sequence[str] | None = None
    ) -> Float[np.ndarray, "N E"]:
        """Unit embeddings of class names in the protocol's templates, averaged over them.

        They are to be compared with those of `embed_image`.

        Args:
          templates: others, each with {} for the name; ("{}",) for whole sentences.

        Raises:
          UserError: no text, or a template without {}.
        """
        texts = () if isinstance(texts, str) else tuple(ordered(texts, "texts"))
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise UserError("texts is a list of at least one text, none of them empty")
        templates = self.protocol.templates if templates is None else templates
        templates = () if isinstance(templates, str) else tuple(templates)
        if not templates or any("{}" not in template for template in templates):
            raise UserError("templates need at least one text, each with {} for the name")
        return self._segmenter.text(texts, templates)[1]

    def _whole_batch(self, batch_size: int) -> int:
        if not isinstance(batch_size, numbers.Integral) or batch_size < 0:
            raise UserError(
                f"batch_size is {batch_size!r}; it must be at least 1, or 0 to choose one"
            )
        return self._segmenter.whole_batch(batch_size)

    def _competition(
        self,
        classes: Iterable[str],
        background: bool | Iterable[str],
        threshold: float | None,
        words: int,
    ) -> tuple[Vocabulary, Protocol]:
        """The words that compete for a pixel, and the protocol with its threshold."""
        if background is False:
            return Vocabulary.of(classes), self.protocol.replace(threshold=None, thresholds={})
        if background is True:
            protocol = self.protocol.for_list_of_classes()
            if words:
                protocol = protocol.replace(competing_words=words)
            vocabulary = competition(
                Vocabulary.of(classes), protocol.replace(threshold=protocol.threshold or 0.0)
            )
            if threshold is None:
                limit = protocol.threshold_for(len(vocabulary.words))
            else:
                limit = threshold
        else:
            vocabulary, limit = Vocabulary.of(classes, background), threshold
        # The threshold is that of these words: nothing is left to adapt.
        return vocabulary, self.protocol.replace(threshold=float(limit or 0.0), competing_words=0)

    def _text(self, words: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        if words not in self._embeddings:
            while len(self._embeddings) >= REMEMBERED:
                self._embeddings.pop(next(iter(self._embeddings)))
            self._embeddings[words] = self._segmenter.text(words, self.protocol.templates)
        return self._embeddings[words]


def _check_options(background: Any, threshold: Any, words: Any) -> None:
    """Raises UserError for options that `LoadedModel.segment` cannot take."""
    if isinstance(background, str):
        raise UserError(f"background is a list of words: [{background!r}], not one text")
    if isinstance(background, numbers.Number) and not isinstance(background, bool):
        raise UserError(f"background is not {background!r}: a least probability is the threshold")
    if not isinstance(background, bool) and not ordered(background, "background"):
        raise UserError("background is True, False, or a list of at least one word for it")
    if not (threshold is None or isinstance(threshold, numbers.Real)):
        raise UserError(f"threshold is a probability, or None for the model's; not {threshold!r}")
    if not isinstance(words, numbers.Integral) or words < 0:
        raise UserError(
            f"words is {words!r}; it must be at least 1, or 0 to take as many as in calibration"
        )


def _as_list(images: AnyImage | Iterable[AnyImage]) -> tuple[bool, list[AnyImage]]:
    """(whether several images were given, the images)."""
    many = isinstance(images, Sequence) and not isinstance(images, str | bytes)
    many = many or getattr(images, "ndim", 0) == 4
    if isinstance(images, Iterator | Set | Mapping):
        kind = type(images).__name__
        raise UserError(f"images is a list, not a {kind}, which `segment_each` takes")
    if many and not len(images):
        raise UserError("no images: give at least one")
    return many, list(images) if many else [images]


def _middle(image: np.ndarray, side: int) -> np.ndarray:
    """The square in the middle of the image, [side, side, 3]."""
    factor = side / min(image.shape[:2])
    h, w = (max(side, round(length * factor)) for length in image.shape[:2])
    top, left = (h - side) // 2, (w - side) // 2
    return resize_image(image, h, w)[top : top + side, left : left + side]
