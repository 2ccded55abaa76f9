"""Scenes as a record source, so that they go through the same pipeline as data on disk."""

import hashlib
import io
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from PIL import Image

from ovseg_jax.data.records import Record
from ovseg_jax.data.scenes.drawing import Scene, scene_at
from ovseg_jax.data.scenes.layout import SPLITS, VERSION, layout_at
from ovseg_jax.errors import UserError


@runtime_checkable
class EntityMatcher(Protocol):
    """Finds entities in a caption: sorted ids, empty where there is none."""

    def find(self, caption: str) -> tuple[int, ...]: ...


class ScenesSource:
    """The first `count` scenes of a split, drawn on demand at `size` pixels.

    Holds no state but its arguments, so any process may read any record in any order.
    """

    name = "scenes"

    def __init__(
        self,
        split: str,
        count: int,
        seed: int,
        size: int,
        entities: EntityMatcher | None = None,
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
        """All keys in order, without drawing."""
        return [self._key(index) for index in range(self.count)]

    def captions(self) -> list[Sequence[str]]:
        """The caption of each scene in order, from layouts alone."""
        return [(layout_at(self.seed, self.split, i).caption,) for i in range(self.count)]

    def fingerprint(self) -> str:
        """Short hash of everything that the records depend on (entities apart)."""
        parts = f"scenes/{VERSION}/{self.seed}/{self.split}/{self.count}/{self.size}"
        return hashlib.sha256(parts.encode()).hexdigest()[:16]
