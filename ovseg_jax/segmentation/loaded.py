"""A model directory as one object that segments images: what `ovseg_jax.load` gives."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from PIL import Image, ImageOps

from ovseg_jax.data.decoding import UnreadableImage, decode, to_rgb
from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.distractors import check_class_names, with_distractors
from ovseg_jax.segmentation.labels import class_probabilities, label_maps
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.segmentation.scores import image_scores, with_scale, without_index
from ovseg_jax.segmentation.segmenter import ModelSegmenter
from ovseg_jax.weights.model_dir import load_model

AnyImage = str | os.PathLike | Image.Image | np.ndarray

# Words in the softmax where neither the caller nor the model's calibration says how many.
WORDS = 20
# Lists of classes whose embeddings are kept.
REMEMBERED = 16


@dataclass(frozen=True)
class Segmentation:
    """What was found in one image.

    Attributes:
      labels: at the size of the image: 0 is background, 1 + i the i-th class.
      classes: their names.
      scores: of each class, its highest probability anywhere in the image, 0 to 1. Probabilities
        compare the words that compete, so they depend on the list of classes.
    """

    labels: Int[np.ndarray, "H W"]
    classes: tuple[str, ...]
    scores: Float[np.ndarray, "C"]

    @property
    def areas(self) -> Float[np.ndarray, "C"]:
        """Share of the image that each class takes, 0 to 1."""
        counts = np.bincount(self.labels.reshape(-1), minlength=1 + len(self.classes))
        return counts[1:] / self.labels.size


class LoadedModel:
    """A trained model with its tokenizer and the protocol it was calibrated for.

    Attributes:
      protocol: how label maps are made.
      info: what the model directory's config.json says, provenance included.
    """

    def __init__(self, directory: str | os.PathLike):
        saved = load_model(Path(directory))
        self.info = saved.info
        protocol = Protocol.from_config(saved.info["protocol"])
        self._segmenter = ModelSegmenter.of_saved(saved, protocol)
        self.protocol = with_scale(protocol, self._segmenter)
        self._embeddings: dict[tuple[str, ...], np.ndarray] = {}

    def segment(
        self,
        image: AnyImage,
        classes: Sequence[str],
        *,
        background: bool = True,
        threshold: float | None = None,
        words: int = 0,
    ) -> Segmentation:
        """Gives every pixel of an image a class, or background.

        Args:
          image: a path, a PIL image, or uint8 [H, W, 3] RGB (or [H, W] gray) of any size.
          classes: names in plain words, such as ["cat", "fire hydrant"].
          background: whether pixels may belong to none of the classes. Without, every pixel gets
            the best class.
          threshold: a pixel whose best probability is lower is background; by default the
            protocol's.
          words: words that compete in all; with fewer classes everyday words are added, and what
            they win becomes background. 0: as many as in the model's calibration.

        Raises:
          UserError: an image that cannot be read, or a bad list of classes.
        """
        options = {"background": background, "threshold": threshold, "words": words}
        _, result = next(self.segment_each([image], classes, **options, batch_size=1))
        return result

    def segment_each(
        self,
        images: Iterable[AnyImage],
        classes: Sequence[str],
        *,
        background: bool = True,
        threshold: float | None = None,
        words: int = 0,
        batch_size: int = 4,
    ) -> Iterator[tuple[int, Segmentation]]:
        """(position, result) of each image as it is done, not always in order; see `segment`.

        Args:
          images: read as they are needed.
          batch_size: windows encoded at once.
        """
        if isinstance(classes, str):
            raise UserError(f"classes is a list of names: [{classes!r}], not one text")
        classes = tuple(classes)
        check_class_names(classes)
        protocol, competing = self.protocol, list(classes)
        if not background:
            protocol = protocol.replace(threshold=None)
        else:
            limit = protocol.threshold if threshold is None else threshold
            protocol = protocol.replace(threshold=0.0 if limit is None else float(limit))
            minimum = words or self.info["provenance"].get("calibrated_words", WORDS)
            competing = with_distractors(classes, minimum=minimum)
        text = self._text(tuple(competing))
        scored = image_scores(
            without_index(self._segmenter.encode),
            text,
            (read_image(image) for image in images),
            protocol,
            batch_size=batch_size,
        )
        count = len(classes)
        for one, labels in label_maps(scored, protocol, classes=count, group=1):
            p = class_probabilities(one, protocol).reshape(-1, len(competing))[:, :count]
            # Without background, labels count the classes from 0.
            shifted = labels if background else labels + 1
            yield one.index, Segmentation(shifted.astype(np.int32), classes, p.max(axis=0))

    def _text(self, words: tuple[str, ...]) -> np.ndarray:
        if words not in self._embeddings:
            while len(self._embeddings) >= REMEMBERED:
                self._embeddings.pop(next(iter(self._embeddings)))
            self._embeddings[words] = self._segmenter.text(words, self.protocol.templates)
        return self._embeddings[words]


def read_image(image: AnyImage) -> np.ndarray:
    """An image as uint8 [H, W, 3]: upright, transparent parts white.

    Raises:
      UserError: a file that cannot be read, or an array of another form.
    """
    if isinstance(image, Image.Image):
        return np.asarray(to_rgb(ImageOps.exif_transpose(image)))
    if isinstance(image, str | os.PathLike):
        try:
            return np.asarray(decode(Path(image).read_bytes()))
        except OSError as error:
            raise UserError(f"{image} cannot be read: {error.strerror}") from None
        except UnreadableImage as error:
            raise UserError(f"{image} is no image that can be read: {error.cause}") from None
    array = np.asarray(image)
    gray = array.ndim == 2
    if array.dtype != np.uint8 or not (gray or array.ndim == 3 and array.shape[2] == 3):
        raise UserError(
            f"an image as an array is uint8 [height, width, 3], 0 to 255, RGB; not {array.dtype} "
            f"{list(array.shape)}"
        )
    if 0 in array.shape:
        raise UserError(f"an image of {array.shape[0]} x {array.shape[1]} pixels is empty")
    return np.repeat(array[..., None], 3, axis=2) if gray else array
