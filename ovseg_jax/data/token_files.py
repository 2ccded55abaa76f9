"""Tokenizer files as people have them: tokenizer.json, or the vocabulary of BERT, RoBERTa or CLIP.

A text encoder's tokenizer frames every sentence and has names of its own for the tokens that are
no words; `FAMILIES` lists the kinds that are understood.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovseg_jax.data import clip_tokens
from ovseg_jax.errors import UserError


@dataclass(frozen=True)
class Family:
    """Special tokens of a kind of tokenizer.

    Attributes:
      name: as people call it.
      transformers: the class that reads it in transformers.
      pad, mask, start, end, unknown: texts of the special tokens. Without a mask token ("") what
        is masked is left out of a text.
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
        """Those of its tokens that the vocabulary of a `tokenizers` object lacks."""
        return [token for token in self.tokens if backend.token_to_id(token) is None]


BERT = Family("BERT", "BertTokenizer", "[PAD]", "[MASK]", "[CLS]", "[SEP]", "[UNK]")
ROBERTA = Family("RoBERTa", "RobertaTokenizer", "<pad>", "<mask>", "<s>", "</s>", "<unk>")
CLIP = Family(
    "CLIP",
    "CLIPTokenizer",
    clip_tokens.END,
    "",
    clip_tokens.START,
    clip_tokens.END,
    clip_tokens.END,
)
FAMILIES = (BERT, ROBERTA, CLIP)


def find_family(backend: Any, origin: str) -> Family:
    """The family that a tokenizer belongs to.

    Raises:
      UserError: its vocabulary has the special tokens of none, or it does not put them around a
        sentence.
    """
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


def tokenizer_files(directory: Path) -> list[Path]:
    """The files in a folder that `load_backend` may read; [] where there are none."""
    whole = directory / "tokenizer.json"
    if whole.is_file():
        return [whole]
    names = ("vocab.txt", "vocab.json", "merges.txt", "tokenizer_config.json")
    return [directory / name for name in names if (directory / name).is_file()]


def load_backend(directory: Path) -> Any:
    """The `tokenizers` object of a folder.

    Raises:
      UserError: there are no files of a tokenizer, or they cannot be read.
    """
    import tokenizers

    whole = directory / "tokenizer.json"
    pieces, merges = directory / "vocab.json", directory / "merges.txt"
    if whole.is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(whole))
        except Exception as error:
            raise UserError(f"{whole} is no tokenizer ({error}); copy the file again") from error
    if (directory / "vocab.txt").is_file():
        lower = _settings(directory).get("do_lower_case", True)
        words = tokenizers.BertWordPieceTokenizer(
            str(directory / "vocab.txt"), lowercase=lower, strip_accents=lower
        )
        return words._tokenizer
    if pieces.is_file() and merges.is_file():
        try:
            if clip_tokens.START in json.loads(pieces.read_text(encoding="utf-8")):
                return clip_tokens.clip_backend(pieces, merges)
            return _byte_level(pieces, merges, _settings(directory).get("add_prefix_space", False))
        except Exception as error:
            raise UserError(
                f"{pieces} and {merges.name} are no byte-pair vocabulary ({error}); copy both again"
            ) from error
    raise UserError(
        f"{directory} has no tokenizer.json and no vocab.txt (BERT) or vocab.json with merges.txt "
        "(RoBERTa, CLIP); give the folder of the text encoder's tokenizer"
    )


def _settings(directory: Path) -> dict[str, Any]:
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is no tokenizer config ({error}); copy the file again") from None


def _byte_level(vocabulary: Path, merges: Path, prefix_space: bool) -> Any:
    # RoBERTa's: byte-level pairs, <s> text </s>, and a <mask> that swallows the blank before it.
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE

    backend = Tokenizer(BPE.from_file(str(vocabulary), str(merges), unk_token=ROBERTA.unknown))
    missing = ROBERTA.missing(backend)
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    ends = [(token, backend.token_to_id(token)) for token in (ROBERTA.end, ROBERTA.start)]
    backend.post_processor = processors.RobertaProcessing(*ends, add_prefix_space=prefix_space)
    plain = [ROBERTA.start, ROBERTA.pad, ROBERTA.end, ROBERTA.unknown]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in plain])
    mask = AddedToken(ROBERTA.mask, lstrip=True, normalized=False, special=True)
    backend.add_special_tokens([mask])
    return backend
