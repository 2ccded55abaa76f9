"""Published visual trunks and text encoders as safetensors, for `config.model.image_init` and
`text_init`."""

import shutil
from pathlib import Path

import numpy as np

from ovseg_jax.errors import UserError
from ovseg_jax.weights.tensors import read_checkpoint, write_checkpoint

# What each kind of tower is recognized by: the end of a tensor's name.
TOWERS = {
    "dino": (
        "patch_embed.proj.weight",
        "patch_embeddings.projection.weight",
        "embeddings.patch_embeddings.weight",
    ),
    "bert": ("embeddings.word_embeddings.weight",),
}
# Files that a text encoder's tokenizer and settings may consist of.
COMPANIONS = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)


def tower_to_safetensors(kind: str, checkpoint: Path, out: Path, entry: str = "") -> list[str]:
    """Writes a visual trunk's or text encoder's weights as safetensors, under the same names.

    Args:
      kind: "dino" or "bert".
      checkpoint: a file, or (bert) the folder of a Hugging Face model with pytorch_model.bin.
      out: a .safetensors file, or a folder for model.safetensors and the tokenizer's files.

    Raises:
      UserError: the checkpoint cannot be read or is no such tower.
    """
    source = checkpoint / "pytorch_model.bin" if checkpoint.is_dir() else checkpoint
    read = read_checkpoint(source, entry)
    if not any(name.endswith(TOWERS[kind]) for name in read.tensors):
        first = ", ".join(list(read.tensors)[:3])
        raise UserError(
            f"{source} is no checkpoint that convert {kind} knows: no tensor's name ends in "
            f"{' or '.join(TOWERS[kind])}. Its first tensors are {first}"
        )
    # Half precision becomes float32, in which everything is computed; the values are the same.
    tensors = {
        name: value.astype(np.float32)
        if value.dtype.itemsize < 4 and value.dtype.kind in "fV"
        else value
        for name, value in read.tensors.items()
    }
    file = out if out.suffix == ".safetensors" else out / "model.safetensors"
    write_checkpoint(file, tensors, "safetensors")
    lines = [f"{len(tensors)} tensors of {source} written to {file}"]
    if file.parent != source.parent and file != out:
        copied = [name for name in COMPANIONS if (source.parent / name).is_file()]
        for name in copied:
            shutil.copyfile(source.parent / name, file.parent / name)
        if copied:
            lines.append(f"copied beside it: {', '.join(copied)}")
    if read.left_out:
        lines.append(f"dropped, no tensors: {', '.join(read.left_out)}")
    return lines
