"""Scenes: an embedded data set of images, captions and masks, composed from the OpenMoji font.

Everything is a pure function of (seed, split, index); nothing is downloaded or stored. Masks come
from the alpha of the drawings and are only for evaluation.
"""

import hashlib
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ovseg_jax.data.entities import EntitySet
from ovseg_jax.data.records import Record
from ovseg_jax.data.scenes.drawing import Scene, draw, scene_at
from ovseg_jax.data.scenes.layout import SPLITS, VERSION, layout_at
from ovseg_jax.data.scenes.vocabulary import CLASSES, scene_entity_table
from ovseg_jax.errors import UserError

__all__ = ["CLASSES", "SPLITS", "ScenesSource", "describe", "scene_at", "scene_entity_table"]

# An object counts as occluded if less than this share of its pixels is visible.
_VISIBLE = 0.9


class ScenesSource:
    """The first `count` scenes of a split as a record source, drawn on demand at `size` pixels.

    It has no state but its arguments, so any process may read any record in any order.

    Args:
      entities: to find in the captions; without them records name none.

    Raises:
      UserError: the split is unknown, or a number is out of range.
    """

    name = "scenes"

    def __init__(
        self, split: str, count: int, seed: int, size: int, entities: EntitySet | None = None
    ):
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r} of scenes: use one of {', '.join(SPLITS)}")
        if count < 1 or size < 16 or seed < 0:
            raise UserError(
                "scenes need count >= 1, size >= 16 pixels and seed >= 0, "
                f"got count={count}, size={size}, seed={seed}"
            )
        self.split, self.count, self.seed, self.size = split, count, seed, size
        self._entities = entities

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        """Record `index`: a PNG, its caption, its key, and the entities of the caption."""
        scene = self.scene(index)
        stream = io.BytesIO()
        # Noise hardly compresses: the fastest level is also nearly the smallest.
        Image.fromarray(scene.image).save(stream, format="PNG", compress_level=1)
        caption = scene.layout.caption
        return Record(
            image=stream.getvalue(),
            captions=(caption,),
            key=self._key(index),
            entities=self._entities.find(caption) if self._entities is not None else (),
        )

    def scene(self, index: int) -> Scene:
        """Scene `index` with its labels, which training never reads."""
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")
        return scene_at(self.seed, self.split, int(index), self.size)

    def _key(self, index: int) -> str:
        return f"{self.split}-{self.seed}-{index:07d}"

    def keys(self) -> list[str]:
        return [self._key(index) for index in range(self.count)]

    def captions(self) -> list[Sequence[str]]:
        """The caption of each scene in order, without drawing."""
        return [(layout_at(self.seed, self.split, i).caption,) for i in range(self.count)]

    def fingerprint(self) -> str:
        """A short hash of everything that the records depend on, except the entities."""
        parts = f"scenes/{VERSION}/{self.seed}/{self.split}/{self.count}/{self.size}"
        return hashlib.sha256(parts.encode()).hexdigest()[:16]


def describe(split: str, count: int, seed: int, size: int) -> dict[str, float]:
    """How hard the first `count` scenes of a split are, drawn at `size` pixels.

    `foreground`: mean share of labeled pixels; `two_classes`: share of scenes with at least two
    classes; `objects`: mean number in a scene; `occluded`: share of objects of which over a tenth
    is covered (`scenes_with_occlusion`: of scenes with such an object); `captions_with_entity`:
    share that names a seen class; `caption_words`: mean length.
    """
    entities = EntitySet(scene_entity_table())
    foreground, two_classes, objects, named, words = [], [], [], [], []
    occluded: list[list[bool]] = []
    for index in range(count):
        layout = layout_at(seed, split, index)
        _, owner, areas = draw(layout, size)
        visible = np.bincount(owner.ravel(), minlength=len(areas) + 1)
        foreground.append(1 - visible[0] / owner.size)
        covered = [bool(v < _VISIBLE * a) for v, a in zip(visible[1:], areas, strict=True)]
        occluded.append(covered)
        two_classes.append(len({item.label for item in layout.objects}) >= 2)
        objects.append(len(layout.objects))
        named.append(bool(entities.find(layout.caption)))
        words.append(len(layout.caption.split()))
    return {
        "scenes": float(count),
        "foreground": float(np.mean(foreground)),
        "two_classes": float(np.mean(two_classes)),
        "objects": float(np.mean(objects)),
        "occluded": float(np.mean([flag for flags in occluded for flag in flags])),
        "scenes_with_occlusion": float(np.mean([any(flags) for flags in occluded])),
        "captions_with_entity": float(np.mean(named)),
        "caption_words": float(np.mean(words)),
    }
