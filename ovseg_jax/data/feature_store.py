"""Features computed once and read many times: memory-mapped arrays with the key of their maker.

A store is a folder with an .npy file for each array and `meta.json`. It gets its name only when it
is complete. Another key (a hash of weights and transform) means that it is another store.
"""

import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ovseg_jax.errors import UserError

_META = "meta.json"
_VERSION = 1
Layout = Mapping[str, tuple[tuple[int, ...], Any]]


class FeatureStore:
    """Named arrays on disk. Get one with `create` (writable) or `open` (read-only).

    For N records, V views and L patches, an image store has `image` [N, V, L, D], and `valid` [N]
    (0 where a record could not be read). A text store holds every text once, for C different
    captions, K masked ones of M tokens, P prompts and T templates: `caption_pooled` [C, Dt],
    `masked_tokens` [K, M, Dt], `masked_mask` [K, M], `prompt_pooled` [P, Dt], `shared_pooled`
    [entities, Dt]. Caption i of record r has the row c = `caption_rows[caption_starts[r] + i]` of
    the captions, `masked_rows[c]` of the masked ones and `prompt_rows[c, t]` of the prompts.
    """

    def __init__(self, directory: Path, key: str, layout: Layout, target: Path | None = None):
        self.directory, self.key, self._target = directory, key, target
        self._layout = {name: (shape, np.dtype(kind)) for name, (shape, kind) in layout.items()}
        self._arrays: dict[str, np.ndarray] = {}

    @classmethod
    def create(cls, directory: str | Path, key: str, arrays: Layout) -> "FeatureStore":
        """Begins a store of zeros (name -> shape, dtype), which `commit` moves to `directory`."""
        target = Path(directory)
        target.parent.mkdir(parents=True, exist_ok=True)
        for left_over in target.parent.glob(f".{target.name}.building-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        building = target.parent / f".{target.name}.building-{uuid.uuid4().hex[:12]}"
        building.mkdir()
        store = cls(building, key, arrays, target)
        for name, (shape, kind) in store._layout.items():
            store._arrays[name] = np.lib.format.open_memmap(
                building / f"{name}.npy", mode="w+", dtype=kind, shape=shape
            )
        return store

    @classmethod
    def open(cls, directory: str | Path, key: str) -> "FeatureStore | None":
        """The store in `directory`; None if it is absent, incomplete, damaged or of another key."""
        directory = Path(directory)
        try:
            meta = json.loads((directory / _META).read_text())
            if meta["version"] != _VERSION or meta["key"] != key:
                return None
            layout = {name: (tuple(shape), kind) for name, (shape, kind) in meta["arrays"].items()}
            store = cls(directory, key, layout)
            for name in store._layout:
                store._load(name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        return store

    def __contains__(self, name: str) -> bool:
        return name in self._layout

    def __getitem__(self, name: str) -> np.ndarray:
        """The array, mapped into memory; a UserError if it is absent or was damaged meanwhile."""
        if name not in self._arrays:
            try:
                self._load(name)
            except (OSError, ValueError, KeyError) as error:
                file = f"{self.directory / name}.npy cannot be read ({error})"
                raise UserError(f"{file}; delete the folder to have it computed again") from error
        return self._arrays[name]

    def _load(self, name: str) -> None:
        shape, kind = self._layout[name]
        array = np.load(self.directory / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        if array.shape != shape or array.dtype != kind:
            raise ValueError(f"array {name} is {array.dtype}{array.shape}, not {kind}{shape}")
        # A plain view of the same pages: np.memmap costs more for every slice.
        self._arrays[name] = array.view(np.ndarray)

    def commit(self) -> "FeatureStore":
        """Moves the folder to its name, over a store that is there; returns it opened read-only."""
        assert self._target is not None, "only a store from `create` can be committed"
        for array in self._arrays.values():
            array.flush()
        self._arrays.clear()
        arrays = {name: (shape, kind.str) for name, (shape, kind) in self._layout.items()}
        meta = {"version": _VERSION, "key": self.key, "arrays": arrays}
        (self.directory / _META).write_text(json.dumps(meta, indent=1) + "\n")
        if self._target.exists():
            shutil.rmtree(self._target)
        self.directory.rename(self._target)
        return FeatureStore(self._target, self.key, self._layout)

    def __getstate__(self) -> dict[str, Any]:
        # Without the memory maps, which would be pickled as copies of their data.
        return {**self.__dict__, "_arrays": {}}
