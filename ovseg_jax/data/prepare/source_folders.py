"""Photographs in class-named folders, DIR/CLASS/file, as torchvision's ImageFolder has them."""

import re
from collections.abc import Iterator

from ovseg_jax.data.prepare import causes
from ovseg_jax.data.prepare.hypernyms import WordNetNames
from ovseg_jax.data.prepare.places import Place, place, reached
from ovseg_jax.data.prepare.raw import InputShard, PairSource, RawPair
from ovseg_jax.errors import UserError

# A shard ends with the class in which it reaches so many files.
_PER_SHARD = 4000
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# What other programs leave behind; hidden files and folders are passed over too.
_NOT_OURS = ("thumbs.db", "desktop.ini", "__macosx")
_WORDNET_ID = re.compile(r"n(\d{8})(?![0-9])")


class FolderSource:
    """One class a folder; its name, "_" read as a blank, is the caption of each image in it.

    Args:
      hypernyms: wider words from WordNet are further captions (`hypernyms.WordNetNames`). Where a
        folder or the first file of it begins with a WordNet id (n02389026), that is looked up, and
        otherwise the name.

    Raises:
      UserError: no such folder, no classes in it, ids for names without `hypernyms`, or WordNet is
        not installed.
    """

    def __init__(self, directory: str | Place, hypernyms: bool = False):
        self.directory = place(directory)
        self.name = "folders of classes" + (", with hypernyms" if hypernyms else "")
        if not self.directory.is_dir():
            raise UserError(f"there is no folder {self.directory}; check --source")
        self._classes = [path.name for path in _listed(self.directory) if path.is_dir()]
        if not self._classes:
            raise UserError(
                f"{self.directory} has no folders in it; it must have one for each class, with "
                "the images of the class"
            )
        wordnet = WordNetNames() if hypernyms else None
        self._names = [self._names_of(folder, wordnet) for folder in self._classes]

    def _names_of(self, folder: str, wordnet: WordNetNames | None) -> tuple[str, ...]:
        name, only_id = " ".join(folder.split("_")).strip(), _WORDNET_ID.fullmatch(folder)
        if wordnet is None:
            if only_id:
                raise UserError(
                    f"{self.directory / folder} has a WordNet id for its name; --hypernyms finds "
                    "the words for it"
                )
            return (name,)
        first = next((path.name for _, path in _files(self.directory / folder, "")), "")
        found = _WORDNET_ID.match(folder) or _WORDNET_ID.match(first)
        return wordnet.names("" if only_id else name, int(found[1]) if found else None)

    def class_names(self) -> list[str]:
        """All names of all classes, each once."""
        return list(dict.fromkeys(name for names in self._names for name in names))

    def shards(self) -> list[InputShard]:
        shards: list[InputShard] = []
        start = first = count = 0
        for number, folder in enumerate(self._classes, 1):
            count += sum(1 for _ in _files(self.directory / folder, folder))
            if count - first >= _PER_SHARD or number == len(self._classes):
                name = f"{self._classes[start]} to {folder}, {count - first} files"
                shards.append(InputShard(name, start, number, first))
                start, first = number, count
        return shards

    def read(self, shard: InputShard, *, images: bool = True) -> Iterator[RawPair]:
        for number in range(shard.start, shard.stop):
            folder = self._classes[number]
            for key, path in _files(self.directory / folder, folder):
                if not path.name.lower().endswith(_IMAGES):
                    yield RawPair(key, cause=causes.NO_IMAGE_FILE)
                    continue
                yield RawPair(key, self._names[number], _content(path) if images else None)


def class_names(source: PairSource) -> list[str]:
    """The names of the classes that a source has for captions; none where it has sentences."""
    return source.class_names() if isinstance(source, FolderSource) else []


def _listed(folder: Place) -> list[Place]:
    """What is in a folder, by name, without what is not meant to be seen."""
    return sorted(
        (
            path
            for path in folder.iterdir()
            if not path.name.startswith(".") and path.name.lower() not in _NOT_OURS
        ),
        key=lambda path: path.name,
    )


def _files(folder: Place, below: str) -> Iterator[tuple[str, Place]]:
    """(key, path) of the files at any depth."""
    for path in _listed(folder):
        key = f"{below}/{path.name}"
        if path.is_dir():
            yield from _files(path, key)
        else:
            yield key, path


def _content(path: Place) -> bytes | None:
    try:
        with reached(path, FileNotFoundError):
            return path.read_bytes()
    except OSError:
        return None
