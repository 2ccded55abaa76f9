"""Published checkpoints of whole models to model directories, and back to the bit."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ovseg_jax
from ovseg_jax.data.tokens import find_tokenizer
from ovseg_jax.errors import UserError
from ovseg_jax.optim.groups import flatten, nest
from ovseg_jax.weights import groupvit, groupvit_names, released
from ovseg_jax.weights.model_dir import SavedModel, load_model, save_model
from ovseg_jax.weights.tensors import Tensors, file_digest, read_checkpoint, write_checkpoint

# Names of a model directory's extra arrays begin with one of these: the moving average of the
# visual encoder, and what the published code stores without using it.
TEACHER, UNUSED = "teacher", "unused"
# In a model directory's provenance: whose tensor names the checkpoint had.
NAMES = "names"


@dataclass(frozen=True)
class PublishedModel:
    """How one published model is read and written.

    Attributes:
      config: tensors and what they cannot tell, to a ``config.model``.
      read: tensors, config, origin to (parameters, running statistics, teacher or None).
      unused: the tensors that serve nothing in the model.
      names: whose names the tensors have.
      write: model, teacher, unused tensors, names, to the tensors.
      tokenizer: what it was trained with, for people.
    """

    config: Callable[..., dict[str, Any]]
    read: Callable[[Tensors, Mapping[str, Any], str], tuple[Any, Any, Any]]
    unused: Callable[[Tensors], Tensors]
    names: Callable[[Tensors], str]
    write: Callable[[SavedModel, Any, Tensors, str], Tensors]
    tokenizer: str


def _unused_of_groupvit(tensors: Tensors) -> Tensors:
    unused = re.compile("|".join(f"(?:{pattern})" for pattern in groupvit_names.UNUSED))
    return {name: value for name, value in tensors.items() if unused.fullmatch(name)}


def _write_groupvit(saved: SavedModel, teacher: Any, unused: Tensors, names: str) -> Tensors:
    model = saved.info["model"]
    return groupvit.to_groupvit(saved.params, saved.batch_stats, model, names) | unused


def _write_released(saved: SavedModel, teacher: Any, unused: Tensors, names: str) -> Tensors:
    model = saved.info["model"]
    return released.to_released(saved.params, saved.batch_stats, model, teacher, unused)


PUBLISHED = {
    "released": PublishedModel(
        config=released.released_config,
        read=released.from_released,
        unused=released.extra_tensors,
        names=lambda tensors: "released",
        write=_write_released,
        # Its vocabulary is bert-base-uncased's.
        tokenizer="hub:distilbert/distilbert-base-uncased",
    ),
    "groupvit": PublishedModel(
        config=groupvit.groupvit_config,
        read=lambda *arguments: (*groupvit.from_groupvit(*arguments), None),
        unused=_unused_of_groupvit,
        names=groupvit.style_of,
        write=_write_groupvit,
        tokenizer="hub:nvidia/groupvit-gcc-yfcc",
    ),
}


@dataclass(frozen=True)
class Told:
    """What weights cannot tell.

    Attributes:
      model: fields for the model's config.
      protocol: how to segment with it.
      tokenizer: see `data.tokens.find_tokenizer`; "" writes a directory without one.
      text_length: tokens that class prompts are padded or cut to.
    """

    model: Mapping[str, Any]
    protocol: Mapping[str, Any]
    tokenizer: str
    text_length: int = 77


def to_model_dir(kind: str, checkpoint: Path, out: Path, told: Told, entry: str = "") -> list[str]:
    """Writes a model directory from a published checkpoint.

    Args:
      kind: key of `PUBLISHED`.
      entry: of a PyTorch file, see `pth.read_state_dict`.

    Returns:
      Lines for people: what was done with the checkpoint's tensors.

    Raises:
      UserError: the checkpoint does not fit (every tensor at fault is listed), or the tokenizer
        is absent or another one's.
    """
    published = PUBLISHED[kind]
    read = read_checkpoint(checkpoint, entry)
    tensors = read.tensors
    config = published.config(tensors, **told.model)
    tokenizer = find_tokenizer(told.tokenizer) if told.tokenizer else None
    vocabulary = config["text"]["vocab_size"]
    if tokenizer is not None and tokenizer.vocab_size > vocabulary:
        raise UserError(
            f"--tokenizer={told.tokenizer} has {tokenizer.vocab_size} tokens, {checkpoint} only "
            f"{vocabulary}: give the tokenizer that it was trained with"
        )
    params, batch_stats, teacher = published.read(tensors, config, str(checkpoint))
    unused = published.unused(tensors)
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
            NAMES: published.names(tensors),
            "told": {key: str(value) for key, value in told.model.items()},
            "tokenizer": told.tokenizer or "none",
            "kept_unused": sorted(unused),
            "dropped": list(read.left_out),
        },
        batch_stats=batch_stats,
        extras={
            **{f"{UNUSED}/{name}": value for name, value in unused.items()},
            **{f"{TEACHER}/{path}": x for path, x in flatten(teacher or {}).items()},
        },
    )
    lines = [f"{len(tensors)} tensors read from {checkpoint}"]
    if unused:
        owners = ", ".join(sorted({name.split(".")[0] for name in unused}))
        lines.append(f"{len(unused)} of them serve nothing and are kept aside ({owners})")
    if teacher is not None:
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
            f"--tokenizer={published.tokenizer}"
        )
    return lines


def from_model_dir(kind: str, model: Path, out: Path, form: str) -> list[str]:
    """Writes a model directory's weights under the published names.

    Args:
      kind: key of `PUBLISHED`. form: key of `tensors.WRITERS`.

    Raises:
      UserError: the model is of another form than the published one.
    """
    saved = load_model(model)
    parts: dict[str, Tensors] = {TEACHER: {}, UNUSED: {}}
    for name, value in saved.extras.items():
        owner, _, rest = name.partition("/")
        parts.setdefault(owner, {})[rest] = value
    names = saved.info["provenance"].get(NAMES, groupvit_names.ORIGINAL)
    teacher = nest(parts[TEACHER]) or None
    tensors = PUBLISHED[kind].write(saved, teacher, parts[UNUSED], names)
    write_checkpoint(out, tensors, form)
    return [f"{len(tensors)} tensors written to {out}"]
