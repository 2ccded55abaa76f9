"""Scenes: an embedded data set of images, captions and masks, composed from the OpenMoji font.

Everything is a pure function of (seed, split, index); nothing is downloaded or stored. Masks come
from the alpha of the drawings and are only for evaluation.
"""

import hashlib
import io
from collections.abc import Sequence

from PIL import Image

from ovseg_jax.data.records import Record
from ovseg_jax.data.scenes.drawing import Scene, describe, scene_at
from ovseg_jax.data.scenes.layout import CLASSES, SPLITS, VERSION, layout_at, scene_entity_table
from ovseg_jax.errors import UserError

__all__ = ["CLASSES", "SPLITS", "ScenesSource", "describe", "scene_at", "scene_entity_table"]


class ScenesSource:
    """The first `count` scenes of a split as a record source, drawn on demand at `size` pixels."""

    name = "scenes"

    def __init__(self, split: str, count: int, seed: int, size: int):
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r} of scenes: use one of {', '.join(SPLITS)}")
        if count < 1 or size < 16 or seed < 0:
            given = f"count={count}, size={size}, seed={seed}"
            raise UserError(f"scenes need count >= 1, size >= 16 and seed >= 0, not {given}")
        self.split, self.count, self.seed, self.size = split, count, seed, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        """Record `index`: a PNG, its caption, its key; entities are found when they are needed."""
        scene = self.scene(index)
        stream = io.BytesIO()
        # Noise hardly compresses: the fastest level is also nearly the smallest.
        Image.fromarray(scene.image).save(stream, format="PNG", compress_level=1)
        return Record(stream.getvalue(), (scene.layout.caption,), self._key(index))

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
