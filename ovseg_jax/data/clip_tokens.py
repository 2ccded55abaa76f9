"""CLIP's byte-pair tokenizer from vocab.json and merges.txt (Radford et al., 2021)."""

from pathlib import Path
from typing import Any

START, END = "<|startoftext|>", "<|endoftext|>"

# What pairs are never merged across: English contractions, letters, single digits, other signs.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def clip_backend(vocabulary: Path, merges: Path) -> Any:
    """The `tokenizers` object that GroupViT's own text encoder reads with.

    Text in lower case, byte-level pairs with the end of a word marked, the start token in front and
    the end token behind.

    Args:
      vocabulary: JSON, token to id. merges: pairs, the most frequent first.

    Raises:
      ValueError: the vocabulary has no start or end token. (What else `tokenizers` raises where
        the files are damaged.)
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.processors import RobertaProcessing

    model = BPE.from_file(
        str(vocabulary),
        str(merges),
        unk_token=END,
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
        fuse_unk=False,
    )
    backend = Tokenizer(model)
    ends = [(token, backend.token_to_id(token)) for token in (END, START)]
    lost = [token for token, identity in ends if identity is None]
    if lost:
        raise ValueError(f"lacks {', '.join(lost)}")
    blanks = normalizers.Replace(Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), blanks, normalizers.Lowercase()])
    split = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, _ in ends])
    return backend
