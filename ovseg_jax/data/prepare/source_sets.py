"""Data sets in other forms: photographs in class-named folders, TFDS, the embedded scenes."""

import functools
import itertools
import operator
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ovseg_jax.data.decoding import IMAGES, is_foreign
from ovseg_jax.data.prepare.pairs import AnyPath, InputShard, RawPair, existing_folder, read_file
from ovseg_jax.data.prepare.rules import BAD_ROW, NO_CLASS, NO_IMAGE_FILE
from ovseg_jax.data.records import MOST_NAMES
from ovseg_jax.data.scenes import ScenesSource
from ovseg_jax.data.words import load_wordnet, wider_names
from ovseg_jax.errors import UserError

# A shard of folders ends with the class in which it reaches so many files.
_FOLDERS_SHARD = 4000
_TFDS_SHARD, _SCENES_SHARD = 10_000, 1000
_WORDNET_ID = re.compile(r"n(\d{8})(?![0-9])")
_CAPTIONS = ("caption", "text", "title", "sentence")
_KEYS = ("key", "id", "image/id", "image_id", "image/filename", "file_name")


class FolderSource:
    """One class a folder; its name, "_" read as a blank, is the caption of each image in it.

    With `hypernyms`, wider words from WordNet are further captions. Where a folder or its first
    file begins with a WordNet id (n02389026), that is looked up, and otherwise the name.
    """

    def __init__(self, directory: str | AnyPath, hypernyms: bool = False):
        self.directory = existing_folder(directory)
        self.name = "folders of classes" + (", with hypernyms" if hypernyms else "")
        listed = _listed(self.directory)
        self._classes = [path.name for path in listed if _is_open(path, ())]
        self._beside = [path.name for path in listed if path.name not in set(self._classes)]
        if not self._classes:
            raise UserError(f"{self.directory} has no folders in it; it needs one for each class")
        wordnet = load_wordnet() if hypernyms else None
        self._names = [self._names_of(folder, wordnet) for folder in self._classes]
        self.class_names = list(dict.fromkeys(itertools.chain.from_iterable(self._names)))

    def _names_of(self, folder: str, wordnet: Any) -> tuple[str, ...]:
        name, only_id = " ".join(folder.split("_")).strip(), _WORDNET_ID.fullmatch(folder)
        if wordnet is None:
            if only_id:
                raise UserError(
                    f"{self.directory / folder} has a WordNet id for its name: give --hypernyms"
                )
            return (name,)
        first = next((path.name for _, path in _files(self.directory / folder, "")), "")
        match = _WORDNET_ID.match(folder) or _WORDNET_ID.match(first)
        offset = int(match[1]) if match else None
        return wider_names(wordnet, "" if only_id else name, offset)[:MOST_NAMES]

    def shards(self) -> list[InputShard]:
        shards: list[InputShard] = []
        start = first = count = 0
        for number, folder in enumerate(self._classes, 1):
            count += sum(1 for _ in _files(self.directory / folder, folder))
            if count - first >= _FOLDERS_SHARD or number == len(self._classes):
                name = f"{self._classes[start]} to {folder}, {count - first} files"
                shards.append(InputShard(name, start, number, first))
                start, first = number, count
        return shards

    def read(self, shard: InputShard, *, images: bool = True) -> Iterator[RawPair]:
        if not shard.start:
            yield from (RawPair(name, cause=NO_CLASS) for name in self._beside)
        for number in range(shard.start, shard.stop):
            folder = self._classes[number]
            for key, path in _files(self.directory / folder, folder):
                hidden = path.name.startswith(".") or path.is_dir()
                if hidden or not path.name.lower().endswith(IMAGES):
                    yield RawPair(key, cause=NO_IMAGE_FILE)
                else:
                    yield RawPair(key, self._names[number], read_file(path) if images else None)


def _listed(folder: AnyPath) -> list[AnyPath]:
    """The content of a folder by name, without what other programs left."""
    paths = (path for path in folder.iterdir() if not is_foreign(path.name))
    return sorted(paths, key=lambda path: path.name)


def _is_open(path: AnyPath, above: tuple[str, ...]) -> bool:
    """Whether this is a folder to look into: not hidden, and no link back to one `above` it."""
    hidden = path.name.startswith(".")
    return not hidden and path.is_dir() and os.path.realpath(path) not in above


def _files(
    folder: AnyPath, below: str, above: tuple[str, ...] = ()
) -> Iterator[tuple[str, AnyPath]]:
    """(key, path) of the files at any depth, and of folders that are not looked into."""
    above += (os.path.realpath(folder),)
    for path in _listed(folder):
        key = f"{below}/{path.name}"
        if _is_open(path, above):
            yield from _files(path, key, above)
        else:
            yield key, path


def _index_shards(name: str, total: int, size: int) -> list[InputShard]:
    return [
        InputShard(f"{name} {start}", start, min(start + size, total))
        for start in range(0, total, size)
    ]


class ScenePairs:
    """The first N scenes of the train split: 'N', or 'N,size=96,seed=1'."""

    name = "scenes"

    def __init__(self, text: str):
        match = re.fullmatch(r"(\d+)(?:,size=(\d+))?(?:,seed=(\d+))?", text)
        if match is None:
            form = "not of the form scenes:1000,size=224,seed=0"
            raise UserError(f"--source=scenes:{text} is {form}")
        number, size, seed = (int(group or 0) for group in match.groups())
        self._source = ScenesSource("train", number, seed, size or 224)

    def shards(self) -> list[InputShard]:
        return _index_shards("scenes", len(self._source), _SCENES_SHARD)

    def read(self, shard: InputShard, *, images: bool = True) -> Iterator[RawPair]:
        for index in range(shard.start, shard.stop):
            record = self._source[index]
            yield RawPair(record.key, tuple(record.captions), record.image)


class TfdsSource:
    """One split of a TFDS set with images and captions, read without TensorFlow.

    The text is 'coco_captions', 'name,split=val', or the folder of a set, prepared with
    `file_format='array_record'`. All captions of an image are kept.
    """

    def __init__(self, text: str):
        self._set, _, rest = text.partition(",")
        name, _, split = rest.partition("=")
        if rest and (name != "split" or not split):
            raise UserError(f"--source=tfds:{text} is not of the form tfds:NAME,split=train")
        self._split = split or "train"
        self.name = f"tfds: {Path(self._set).name}, {self._split}"
        info = self._builder().info
        if self._split not in info.splits:
            known = ", ".join(info.splits) or "none: prepare the set first"
            raise UserError(
                f"the TFDS set {self._set} has no split {self._split!r}; it has {known}"
            )
        # TFDS lists the features of a set in no fixed order; the choice must not change.
        leaves = sorted(_leaves(info.features), key=lambda leaf: leaf[0])
        images = [path for path, kind, depth in leaves if kind == "Image" and not depth]
        texts = [path for path, kind, depth in leaves if kind == "Text" and depth < 2]
        captions = [path for path in texts if any(word in "/".join(path) for word in _CAPTIONS)]
        if not images or not captions:
            names = ", ".join("/".join(path) for path, _, _ in leaves)
            lacking = "caption" if images else "image"
            raise UserError(
                f"the TFDS set {self._set} has no {lacking} among its features: {names}"
            )
        self._image, self._caption = images[0], captions[0]
        self._key = next((name for name in _KEYS if name in info.features), None)
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
        return _index_shards("examples from", len(self._open()), _TFDS_SHARD)

    def read(self, shard: InputShard, *, images: bool = True) -> Iterator[RawPair]:
        data = self._open()
        for index in range(shard.start, shard.stop):
            key = f"{self._split}-{index:08d}"
            try:
                example = data[index]
            except Exception:
                # The reader raises anything on damaged bytes; only this example is lost.
                yield RawPair(key, cause=BAD_ROW)
                continue
            if self._key is not None:
                stored = example[self._key]
                is_text = isinstance(stored, bytes)
                key = stored.decode("utf-8", "surrogateescape") if is_text else str(stored)
            captions = functools.reduce(operator.getitem, self._caption, example)
            if isinstance(captions, bytes | str):
                captions = (captions,)
            image = functools.reduce(operator.getitem, self._image, example)
            yield RawPair(key, tuple(captions), bytes(image) if images else None)

    def _open(self) -> Any:
        if self._data is None:
            import tensorflow_datasets as tfds

            decoders = tfds.decode.SkipDecoding()
            for name in reversed(self._image):
                decoders = {name: decoders}
            try:
                self._data = self._builder().as_data_source(self._split, decoders=decoders)
            except (NotImplementedError, ValueError, AssertionError, OSError) as error:
                write = "tfds.builder(NAME, file_format='array_record').download_and_prepare()"
                wrong = f"the TFDS set {self._set} cannot be read at random access"
                raise UserError(f"{wrong}; prepare it with {write}") from error
        return self._data

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_data": None}


_Leaf = tuple[tuple[str, ...], str, int]


def _leaves(features: Any, path: tuple[str, ...] = (), depth: int = 0) -> Iterator[_Leaf]:
    """(names, class of the feature, how many sequences it is in) of every feature."""
    inner = getattr(features, "feature", None)  # of a sequence
    if inner is not None:
        yield from _leaves(inner, path, depth + 1)
    elif hasattr(features, "keys"):
        for name in features.keys():
            yield from _leaves(features[name], (*path, name), depth)
    else:
        yield path, type(features).__name__, depth
