"""Published checkpoints of whole models to model directories, and back; towers to safetensors."""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import ovseg_jax
from ovseg_jax.data.tokens import find_tokenizer
from ovseg_jax.errors import UserError
from ovseg_jax.optim.groups import flatten, nest
from ovseg_jax.weights import released
from ovseg_jax.weights.model_dir import load_model, save_model
from ovseg_jax.weights.state_dict import StateDict, read_state_dict, without_wrappers
from ovseg_jax.weights.tensors import PYTORCH, Tensors, read_tensors, write_safetensors
from ovseg_jax.weights.torch_writer import write_torch

# Names of a model directory's extra arrays begin with one of these.
TEACHER, UNUSED = "teacher", "released"

# What the released model was trained with. Its vocabulary is bert-base-uncased's.
RELEASED_TOKENIZER = "hub:distilbert/distilbert-base-uncased"

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
WRITERS: dict[str, Callable[[Path, Tensors], None]] = {
    "pth": write_torch,
    "safetensors": write_safetensors,
    "npz": lambda path, tensors: np.savez(path, **tensors),
}


@dataclass(frozen=True)
class Told:
    """What the released model's weights cannot tell.

    Attributes:
      model: fields for `released.released_config`.
      protocol: how to segment with it.
      tokenizer: see `data.tokens.find_tokenizer`; "" writes a directory without one.
      text_length: tokens that class prompts are padded or cut to.
    """

    model: Mapping[str, Any]
    protocol: Mapping[str, Any]
    tokenizer: str
    text_length: int = 77


def read_checkpoint(path: Path, entry: str = "") -> StateDict:
    """The tensors of a .pth (.pt, .bin, .ckpt), .safetensors, .npz or .onnx file.

    Raises:
      UserError: the file cannot be read, or would run code on load.
    """
    if not path.is_file():
        raise UserError(f"--checkpoint={path}: there is no such file")
    if path.suffix in PYTORCH:
        return read_state_dict(path, entry)
    if entry:
        raise UserError(f"--entry is for {', '.join(PYTORCH)} files; {path} has no entries")
    return StateDict(without_wrappers(read_tensors(path)), "", ())


def released_to_model_dir(checkpoint: Path, out: Path, told: Told, entry: str = "") -> list[str]:
    """Writes a model directory from a checkpoint of the released PyTorch model.

    Returns:
      Lines for people: what was done with the checkpoint's tensors.

    Raises:
      UserError: the checkpoint does not fit (every tensor at fault is listed), or there is no
        tokenizer.
    """
    read = read_checkpoint(checkpoint, entry)
    tensors = read.tensors
    config = released.released_config(tensors, **told.model)
    tokenizer = find_tokenizer(told.tokenizer) if told.tokenizer else None
    vocabulary = config["text"]["vocab_size"]
    if tokenizer is not None and tokenizer.vocab_size > vocabulary:
        raise UserError(
            f"--tokenizer={told.tokenizer} has {tokenizer.vocab_size} tokens, {checkpoint} only "
            f"{vocabulary}: give the tokenizer that it was trained with"
        )
    params, batch_stats, teacher = released.from_released(tensors, config, str(checkpoint))
    extra = released.extra_tensors(tensors)
    coarse = {x.dtype.name for x in tensors.values() if x.dtype.kind in "fV"} - {"float32"}
    save_model(
        out,
        params,
        tokenizer,
        model=config,
        protocol=told.protocol,
        text_length=min(told.text_length, config["text"]["max_positions"]),
        benchmarks={},
        provenance={
            "written_by": f"ovseg_jax {ovseg_jax.__version__}",
            "converted_from": checkpoint.name,
            "sha256": file_digest(checkpoint),
            "entry": read.entry or "the whole file",
            "told": {key: str(value) for key, value in told.model.items()},
            "tokenizer": told.tokenizer or "none",
            "kept_unused": sorted(extra),
            "dropped": list(read.left_out),
        },
        batch_stats=batch_stats,
        extras={
            **{f"{UNUSED}/{name}": value for name, value in extra.items()},
            **{f"{TEACHER}/{path}": x for path, x in flatten(teacher or {}).items()},
        },
    )
    unused = sorted({name.split(".")[0] for name in extra})
    lines = [
        f"{len(tensors)} tensors read from {checkpoint}",
        f"{len(extra)} of them serve nothing in the model and are kept aside"
        + (f" ({', '.join(unused)})" if unused else ""),
    ]
    if teacher is None:
        lines.append("no moving average of the visual encoder among them")
    if read.left_out:
        lines.append(f"dropped, no tensors: {', '.join(read.left_out)}")
    if coarse:
        lines.append(f"stored as float32 from now on: {', '.join(sorted(coarse))}")
    if tokenizer is None:
        lines.append(
            "no tokenizer: weights hold no vocabulary. Before classes can be named, copy the "
            f"tokenizer.json or vocab.txt of BERT (uncased) to {out}, or convert with "
            f"--tokenizer=DIR or, with a network, --tokenizer={RELEASED_TOKENIZER}"
        )
    return lines


def model_dir_to_released(model: Path, out: Path, form: str) -> list[str]:
    """Writes a model directory's weights under the released names.

    Args:
      form: key of `WRITERS`.

    Raises:
      UserError: the model is of another form than the released one.
    """
    saved = load_model(model)
    extra: Tensors = {}
    teacher: Tensors = {}
    for name, value in saved.extras.items():
        owner, _, rest = name.partition("/")
        {TEACHER: teacher, UNUSED: extra}.get(owner, {})[rest] = value
    tensors = released.to_released(
        saved.params, saved.batch_stats, saved.info["model"], nest(teacher) or None, extra
    )
    write(out, tensors, form)
    return [f"{len(tensors)} tensors written to {out}"]


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
    write(file, tensors, "safetensors")
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


def write(path: Path, tensors: Mapping[str, np.ndarray], form: str) -> None:
    """Writes tensors to one file, whole or not at all.

    Args:
      form: key of `WRITERS`.
    """
    # numpy adds .npz to a name that has not got it.
    partial = path.with_name(f".{path.name}.partial.{form}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        WRITERS[form](partial, {k: np.asarray(v, order="C") for k, v in tensors.items()})
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
