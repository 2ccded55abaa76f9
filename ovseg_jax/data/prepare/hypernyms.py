"""Wider words for the name of a class, from WordNet: 'sorrel' is a horse, 'studio couch' a sofa."""

import re
from typing import Any

from ovseg_jax.data.examples import MOST_NAMES
from ovseg_jax.errors import UserError

# Kinds this near to the top of WordNet, 'entity', say nothing of how a thing looks: object, whole,
# artifact (depth 4), instrumentality, organism (5), animal, device, container, food (4 to 6).
_TOP = 6
# And so do these, which lie deeper.
_TOO_WIDE = frozenset(
    "vertebrate.n.01 mammal.n.01 domestic_animal.n.01 craft.n.02 instrument.n.01 barrier.n.01 "
    "game.n.04 electronic_equipment.n.01 percussion_instrument.n.01".split()
)
_WORDS = re.compile(r"[a-z-]+(_[a-z-]+)?")


class WordNetNames:
    """Looks names up in NLTK's WordNet.

    Raises:
      UserError: its data are not installed.
    """

    def __init__(self) -> None:
        from nltk.corpus import wordnet

        try:
            wordnet.ensure_loaded()
        except (LookupError, OSError) as error:
            raise UserError(
                "--hypernyms needs the data of WordNet; get them with: "
                "python -m nltk.downloader wordnet"
            ) from error
        self._wordnet: Any = wordnet

    def names(self, name: str, offset: int | None = None) -> tuple[str, ...]:
        """The name itself and up to three everyday words for it, the nearest first.

        These are the lemmas of its synset and of those above it which WordNet's own texts use at
        all, of one or two words, in small letters.

        Args:
          name: of the class; empty where only `offset` is known.
          offset: of the synset, the digits of its WordNet id. By default the first noun synset
            that spells the name like this and is a kind of thing, not one person or place.
        """
        synset = self._first(name) if offset is None else self._at(offset)
        lemmas = [name] if name else [synset.lemma_names()[0].replace("_", " ")]
        level = [synset] if synset is not None else []
        while level:
            for one in level:
                if one.min_depth() > _TOP and one.name() not in _TOO_WIDE:
                    lemmas += [
                        lemma.name().replace("_", " ")
                        for lemma in one.lemmas()
                        if _WORDS.fullmatch(lemma.name()) and lemma.count()
                    ]
            level = list(dict.fromkeys(above for one in level for above in one.hypernyms()))
        names: dict[str, str] = {}
        for lemma in lemmas:
            names.setdefault(lemma.lower(), lemma)
        return tuple(names.values())[:MOST_NAMES]

    def _first(self, name: str) -> Any:
        spelled = name.replace(" ", "_")
        kinds = [s for s in self._wordnet.synsets(spelled, "n") if not s.instance_hypernyms()]
        alike = [synset for synset in kinds if spelled in synset.lemma_names()]
        return next(iter(alike or kinds), None)

    def _at(self, offset: int) -> Any:
        try:
            return self._wordnet.synset_from_pos_and_offset("n", offset)
        except Exception as error:
            # NLTK fails in many ways where no synset begins at the offset.
            raise UserError(
                f"n{offset:08d} is no WordNet 3.0 id of a noun; correct the names of folders and "
                "files, or give the folders words for names"
            ) from error
