"""What `ovseg_jax.convert` does: checkpoints into model directories and back, and towers."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import ovseg_jax
from ovseg_jax.data.tokenizer import find_tokenizer
from ovseg_jax.errors import UserError
from ovseg_jax.optim.groups import flatten, nest
from ovseg_jax.weights import groupvit, released
from ovseg_jax.weights.links import matching
from ovseg_jax.weights.model_dir import load_model, save_model
from ovseg_jax.weights.published_config import groupvit_config, released_config
from ovseg_jax.weights.tensors import Tensors, file_digest, read_checkpoint, write_checkpoint

# Names of a model directory's extra arrays begin with one of these: the moving average of the
# visual encoder, and what the published code stores without using it.
TEACHER, UNUSED = "teacher", "unused"
# In a model directory's provenance: whose tensor names the checkpoint had.
NAMES = "names"

# Tokenizers of the published models. The released model's has bert-base-uncased's vocabulary.
TOKENIZERS = {
    "released": "hub:distilbert/distilbert-base-uncased",
    "groupvit": "hub:nvidia/groupvit-gcc-yfcc",
}


@dataclass(frozen=True)
class Settings:
    """What weights cannot tell.

    Attributes:
      model: fields for the model's config.
      protocol: how to segment with it.
      tokenizer: see `data.tokenizer.find_tokenizer`; "" writes a directory without one.
      text_length: tokens that class prompts are padded or cut to.
    """

    model: Mapping[str, Any]
    protocol: Mapping[str, Any]
    tokenizer: str
    text_length: int = 77


def to_model_dir(
    kind: str, checkpoint: Path, out: Path, settings: Settings, entry: str = ""
) -> list[str]:
    """Writes a model directory from a published checkpoint.

    Args:
      kind: key of `TOKENIZERS`.
      checkpoint: file with the published weights.
      out: directory to write.
      settings: what the weights cannot tell.
      entry: of a PyTorch file, see `pth.read_state_dict`.

    Returns:
      Lines for people: what was done with the checkpoint's tensors.

    Raises:
      UserError: the checkpoint does not fit (every tensor at fault is listed), or the tokenizer
        is absent or has too many tokens.
    """
    read = read_checkpoint(checkpoint, entry)
    tensors, origin = read.tensors, str(checkpoint)
    teacher = None
    if kind == "released":
        config, names = released_config(tensors, **settings.model), kind
        params, batch_stats, teacher = released.from_released(tensors, config, origin)
        unused = released.extra_tensors(tensors)
    else:
        config, names = groupvit_config(tensors, **settings.model), groupvit.style_of(tensors)
        params, batch_stats = groupvit.from_groupvit(tensors, config, origin)
        unused = {name: tensors[name] for name in matching(tensors, groupvit.UNUSED)}
    tokenizer = find_tokenizer(settings.tokenizer) if settings.tokenizer else None
    vocabulary = config["text"]["vocab_size"]
    if tokenizer is not None and tokenizer.vocab_size > vocabulary:
        raise UserError(
            f"--tokenizer={settings.tokenizer} has {tokenizer.vocab_size} tokens, {checkpoint} "
            f"only {vocabulary}: give the tokenizer that it was trained with"
        )
    save_model(
        out,
        params,
        tokenizer,
        model=config,
        protocol=settings.protocol,
        text_length=min(settings.text_length, config["text"]["max_positions"]),
        benchmarks={},
        provenance={
            "written_by": f"ovseg_jax {ovseg_jax.__version__}",
            "converted_from": checkpoint.name,
            "sha256": file_digest(checkpoint),
            "entry": read.entry or "the whole file",
            NAMES: names,
            "settings": {key: str(value) for key, value in settings.model.items()},
            "tokenizer": settings.tokenizer or "none",
            "kept_unused": sorted(unused),
            "dropped": list(read.left_out),
        },
        batch_stats=batch_stats,
        extras={
            **{f"{UNUSED}/{name}": value for name, value in unused.items()},
            **{f"{TEACHER}/{path}": value for path, value in flatten(teacher or {}).items()},
        },
    )
    lines = [f"{len(tensors)} tensors read from {checkpoint}"]
    if unused:
        modules = ", ".join(sorted({name.split(".")[0] for name in unused}))
        lines.append(f"{len(unused)} of them are not used and are kept aside ({modules})")
    if teacher:
        lines.append("with a moving average of the visual encoder, which is kept aside")
    if read.left_out:
        lines.append(f"dropped, no tensors: {', '.join(read.left_out)}")
    coarse = {x.dtype.name for x in tensors.values() if x.dtype.kind in "fV"} - {"float32"}
    if coarse:
        lines.append(f"stored as float32 from now on: {', '.join(sorted(coarse))}")
    if tokenizer is None:
        lines.append(
            "no tokenizer: weights hold no vocabulary. Before classes can be named, copy the "
            f"tokenizer's files to {out}, or convert with --tokenizer=DIR or, with a network, "
            f"--tokenizer={TOKENIZERS[kind]}"
        )
    return lines


def from_model_dir(kind: str, model: Path, out: Path, form: str) -> list[str]:
    """Writes a model directory's weights under the published names.

    Args:
      kind: key of `TOKENIZERS`.
      model: the model directory.
      out: file to write.
      form: key of `tensors.WRITERS`.

    Returns:
      Lines for people.

    Raises:
      UserError: the model is of another form than the published one.
    """
    saved = load_model(model)
    extras: dict[str, Tensors] = {TEACHER: {}, UNUSED: {}}
    for name, value in saved.extras.items():
        group, _, rest = name.partition("/")
        extras.setdefault(group, {})[rest] = value
    names = saved.info["provenance"].get(NAMES, groupvit.ORIGINAL)
    teacher = nest(extras[TEACHER]) or None
    model = saved.params, saved.batch_stats, saved.info["model"]
    if kind == "released":
        tensors = released.to_released(*model, teacher, extras[UNUSED])
    else:
        tensors = groupvit.to_groupvit(*model, names) | extras[UNUSED]
    write_checkpoint(out, tensors, form)
    return [f"{len(tensors)} tensors written to {out}"]


# ---- towers, for `config.model.image_init` and `text_init`

# The end of a tensor's name by which each kind of tower is known.
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
      entry: of a PyTorch file, see `pth.read_state_dict`.

    Returns:
      Lines for people.

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
