"""Any TFDS set with an image and a caption, read without TensorFlow.

The set must have been prepared with `file_format='array_record'`. An image with several captions
keeps them all.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ovseg_jax.data.prepare import causes
from ovseg_jax.data.prepare.raw import InputShard, RawPair
from ovseg_jax.errors import UserError

_PER_SHARD = 10_000
_CAPTIONS = ("caption", "text", "title", "sentence")
_KEYS = ("key", "id", "image/id", "image_id", "image/filename", "file_name")


class TfdsSource:
    """One split of a set: 'coco_captions', 'name,split=val', or a folder of a prepared set.

    Raises:
      UserError: no such set, not prepared as ArrayRecord, or no image or caption in it.
    """

    def __init__(self, text: str):
        self._set, _, rest = text.partition(",")
        name, _, split = rest.partition("=")
        if rest and (name != "split" or not split):
            raise UserError(f"--source=tfds:{text} is not of the form tfds:NAME,split=train")
        self._split = split or "train"
        self.name = f"tfds: {Path(self._set).name}, {self._split}"
        builder = self._builder()
        if self._split not in builder.info.splits:
            known = ", ".join(builder.info.splits) or "none: prepare the set first"
            raise UserError(
                f"the TFDS set {self._set} has no split {self._split!r}; it has {known}"
            )
        # TFDS lists the features of a set in no fixed order; which is taken must not change.
        leaves = sorted(_leaves(builder.info.features), key=lambda leaf: leaf[0])
        images = [path for path, part, depth in leaves if _is(part, "Image") and not depth]
        captions = [
            path
            for path, part, depth in leaves
            if _is(part, "Text") and depth < 2 and any(w in "/".join(path) for w in _CAPTIONS)
        ]
        names = ["/".join(path) for path, _, _ in leaves]
        self._image = images[0] if images else None
        self._caption = captions[0] if captions else None
        if self._image is None or self._caption is None:
            raise UserError(
                f"the TFDS set {self._set} has no {'image' if self._image is None else 'caption'} "
                f"among its features: {', '.join(names)}"
            )
        names = set(builder.info.features.keys())
        self._key = next(((name,) for name in _KEYS if name in names), None)
        self._data: Any = None

    def _builder(self) -> Any:
        # Imported here: it takes seconds.
        import tensorflow_datasets as tfds

        try:
            if Path(self._set).is_dir():
                return tfds.builder_from_directory(self._set)
            return tfds.builder(self._set)
        except (tfds.core.DatasetNotFoundError, ValueError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"TFDS does not find the set {self._set!r}: {reason}") from error

    def shards(self) -> list[InputShard]:
        total = len(self._open())
        return [
            InputShard(f"examples from {start}", start, min(start + _PER_SHARD, total))
            for start in range(0, total, _PER_SHARD)
        ]

    def read(self, shard: InputShard, *, images: bool = True) -> Iterator[RawPair]:
        data = self._open()
        for index in range(shard.start, shard.stop):
            key = f"{self._split}-{index:08d}"
            try:
                example = data[index]
            except Exception:
                # The readers below raise anything on damaged bytes; it concerns this example only.
                yield RawPair(key, cause=causes.BAD_ROW)
                continue
            if self._key is not None:
                key = _text(_at(example, self._key))
            captions = _at(example, self._caption)
            if isinstance(captions, bytes | str):
                captions = (captions,)
            image = bytes(_at(example, self._image)) if images else None
            yield RawPair(key, tuple(captions), image)

    def _open(self) -> Any:
        if self._data is None:
            import tensorflow_datasets as tfds

            decoders = tfds.decode.SkipDecoding()
            for name in reversed(self._image or ()):
                decoders = {name: decoders}
            try:
                self._data = self._builder().as_data_source(self._split, decoders=decoders)
            except (NotImplementedError, ValueError, AssertionError, OSError) as error:
                raise UserError(
                    f"the TFDS set {self._set} cannot be read at random access; prepare it with "
                    "tfds.builder(NAME, file_format='array_record').download_and_prepare()"
                ) from error
        return self._data

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_data": None}


def _leaves(
    features: Any, path: tuple[str, ...] = (), depth: int = 0
) -> Iterator[tuple[tuple[str, ...], Any, int]]:
    """(names, feature, how many sequences it is in) of every feature."""
    inner = getattr(features, "feature", None)  # of a sequence
    if inner is not None:
        yield from _leaves(inner, path, depth + 1)
    elif hasattr(features, "keys"):
        for name in features.keys():
            yield from _leaves(features[name], (*path, name), depth)
    else:
        yield path, features, depth


def _is(feature: Any, kind: str) -> bool:
    return type(feature).__name__ == kind


def _at(example: Any, path: tuple[str, ...] | None) -> Any:
    for name in path or ():
        example = example[name]
    return example


def _text(value: Any) -> str:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
