"""Photographs in class-named folders, DIR/CLASS/file, as torchvision's ImageFolder has them.

WordNet gives wider words for the name of a class: 'sorrel' is a horse, 'studio couch' a sofa.
"""

import re
from collections.abc import Iterator
from typing import Any

from ovseg_jax.data.examples import MOST_NAMES
from ovseg_jax.data.prepare.paths import AnyPath, network_errors, parse_path
from ovseg_jax.data.prepare.raw_pairs import NO_IMAGE_FILE, InputShard, RawPair
from ovseg_jax.errors import UserError

# A shard ends with the class in which it reaches so many files.
_PER_SHARD = 4000
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# What other programs leave behind; hidden files and folders are passed over too.
_IGNORED = ("thumbs.db", "desktop.ini", "__macosx")
_WORDNET_ID = re.compile(r"n(\d{8})(?![0-9])")
# Kinds this near to the top of WordNet, 'entity', say nothing of how a thing looks: object, whole,
# artifact (depth 4), instrumentality, organism (5), animal, device, container, food (4 to 6).
_TOP = 6
# Nor do these, which lie deeper.
_TOO_WIDE = frozenset(
    "vertebrate.n.01 mammal.n.01 domestic_animal.n.01 craft.n.02 instrument.n.01 barrier.n.01 "
    "game.n.04 electronic_equipment.n.01 percussion_instrument.n.01".split()
)
_WORDS = re.compile(r"[a-z-]+(_[a-z-]+)?")


class FolderSource:
    """One class a folder; its name, "_" read as a blank, is the caption of each image in it.

    Args:
      directory: the folder with the classes.
      hypernyms: wider words from WordNet are further captions. Where a folder or its first file
        begins with a WordNet id (n02389026), that is looked up, and otherwise the name.

    Raises:
      UserError: no such folder, no classes in it, ids for names without `hypernyms`, or WordNet is
        not installed.
    """

    def __init__(self, directory: str | AnyPath, hypernyms: bool = False):
        self.directory = parse_path(directory)
        self.name = "folders of classes" + (", with hypernyms" if hypernyms else "")
        if not self.directory.is_dir():
            raise UserError(f"there is no folder {self.directory}; check --source")
        self._classes = [path.name for path in _visible(self.directory) if path.is_dir()]
        if not self._classes:
            raise UserError(
                f"{self.directory} has no folders in it; it must have one for each class, with "
                "the images of the class"
            )
        wordnet = _load_wordnet() if hypernyms else None
        self._names = [self._names_of(folder, wordnet) for folder in self._classes]

    def _names_of(self, folder: str, wordnet: Any) -> tuple[str, ...]:
        name, only_id = " ".join(folder.split("_")).strip(), _WORDNET_ID.fullmatch(folder)
        if wordnet is None:
            if only_id:
                raise UserError(
                    f"{self.directory / folder} has a WordNet id for its name; --hypernyms finds "
                    "the words for it"
                )
            return (name,)
        first = next((path.name for _, path in _files(self.directory / folder, "")), "")
        match = _WORDNET_ID.match(folder) or _WORDNET_ID.match(first)
        return _wider_names(wordnet, "" if only_id else name, int(match[1]) if match else None)

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
                    yield RawPair(key, cause=NO_IMAGE_FILE)
                    continue
                yield RawPair(key, self._names[number], _content(path) if images else None)


def _visible(folder: AnyPath) -> list[AnyPath]:
    """The content of a folder by name, without hidden files and those of other programs."""
    paths = sorted(folder.iterdir(), key=lambda path: path.name)
    return [p for p in paths if not p.name.startswith(".") and p.name.lower() not in _IGNORED]


def _files(folder: AnyPath, below: str) -> Iterator[tuple[str, AnyPath]]:
    """(key, path) of the files at any depth."""
    for path in _visible(folder):
        key = f"{below}/{path.name}"
        if path.is_dir():
            yield from _files(path, key)
        else:
            yield key, path


def _content(path: AnyPath) -> bytes | None:
    try:
        with network_errors(path, FileNotFoundError):
            return path.read_bytes()
    except OSError:
        return None


def _load_wordnet() -> Any:
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except (LookupError, OSError) as error:
        raise UserError(
            "--hypernyms needs the data of WordNet; get them with: "
            "python -m nltk.downloader wordnet"
        ) from error
    return wordnet


def _wider_names(wordnet: Any, name: str, offset: int | None) -> tuple[str, ...]:
    """The name itself and up to three everyday words for it, the nearest first.

    These are the lemmas of the name's synset and of the synsets above it that occur in WordNet's
    own texts, have one or two words, and are in small letters.

    Args:
      wordnet: NLTK's reader.
      name: of the class; empty where only `offset` is known.
      offset: of the synset, the digits of its WordNet id. By default the first noun synset that
        spells the name like this and is a kind of thing, not a single person or place.
    """
    synset = _first_synset(wordnet, name) if offset is None else _synset_at(wordnet, offset)
    lemmas = [name] if name else [synset.lemma_names()[0].replace("_", " ")]
    level = [synset] if synset is not None else []
    while level:
        for kind in level:
            if kind.min_depth() > _TOP and kind.name() not in _TOO_WIDE:
                lemmas += [
                    lemma.name().replace("_", " ")
                    for lemma in kind.lemmas()
                    if _WORDS.fullmatch(lemma.name()) and lemma.count()
                ]
        level = list(dict.fromkeys(above for kind in level for above in kind.hypernyms()))
    names: dict[str, str] = {}
    for lemma in lemmas:
        names.setdefault(lemma.lower(), lemma)
    return tuple(names.values())[:MOST_NAMES]


def _first_synset(wordnet: Any, name: str) -> Any:
    spelled = name.replace(" ", "_")
    kinds = [s for s in wordnet.synsets(spelled, "n") if not s.instance_hypernyms()]
    alike = [synset for synset in kinds if spelled in synset.lemma_names()]
    return next(iter(alike or kinds), None)


def _synset_at(wordnet: Any, offset: int) -> Any:
    try:
        return wordnet.synset_from_pos_and_offset("n", offset)
    except Exception as error:
        # NLTK fails in many ways where no synset begins at the offset.
        raise UserError(
            f"n{offset:08d} is no WordNet 3.0 id of a noun; correct the names of folders and "
            "files, or give the folders words for names"
        ) from error
