"""Published weights into files that everything else here reads, and back.

``python -m ovseg_jax.convert released --checkpoint=FILE.pth --out=MODEL_DIR --tokenizer=DIR``
"""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import ovseg_jax
from ovseg_jax import flags
from ovseg_jax.data.tokenizer import find_tokenizer
from ovseg_jax.errors import UserError
from ovseg_jax.flags import Flag
from ovseg_jax.segmentation.protocol import named_protocol
from ovseg_jax.weights import groupvit, released
from ovseg_jax.weights.links import matching
from ovseg_jax.weights.model_dir import check_free, load_model, save_model
from ovseg_jax.weights.pth import (
    WRITERS,
    StateDict,
    is_written_here,
    read_checkpoint,
    write_checkpoint,
)
from ovseg_jax.weights.tower_links import BERT_ANCHOR, VIT_ANCHORS
from ovseg_jax.weights.weight_files import UNWRITABLE, Tensors, cannot_write, file_digest

ABOUT = """Convert published weights. Files that would run code are refused.

  convert released --checkpoint=FILE --out=MODEL_DIR    the released OVSegmentor
  convert released --model=MODEL_DIR --to=pth --out=FILE.pth    and back, to the bit
  convert groupvit --checkpoint=FILE --out=MODEL_DIR    GroupViT, its authors' or Hugging Face's
  convert dino     --checkpoint=FILE.pth --out=DIR      a visual trunk, for config.model.image_init
  convert bert     --checkpoint=FILE.bin --out=DIR      a text encoder, for config.model.text_init

FILE is .npz, .safetensors or .onnx; of any other name it is read as a PyTorch file, for which
PyTorch is needed (pip install ".[convert]"). `convert KIND --help` lists the flags.
"""

# Names of a model directory's extra arrays begin with one of these: the moving average of the
# visual encoder, and what the published code stores without using it.
TEACHER, UNUSED = "teacher", "unused"
# In a model directory's provenance: whose tensor names the checkpoint had.
NAMES = "names"
CONVERTED = "converted_from"

# Tokenizers of the published models. The released model's has bert-base-uncased's vocabulary.
TOKENIZERS = {
    "released": "hub:distilbert/distilbert-base-uncased",
    "groupvit": "hub:nvidia/groupvit-gcc-yfcc",
}
# The end of a tensor's name by which each kind of tower is known.
TOWERS = {"dino": VIT_ANCHORS, "bert": (BERT_ANCHOR,)}
# Files that a text encoder's tokenizer and settings may consist of.
COMPANIONS = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
COMPANIONS += ("vocab.txt", "vocab.json", "merges.txt")


def _two_numbers(text: str) -> tuple[int, int]:
    first, second = (int(number) for number in text.split(","))
    if min(first, second) < 1:
        raise ValueError
    return first, second


_two_numbers.__name__ = "pair of whole numbers, for example 8,8"

ENTRY = Flag("entry", help="entry of the checkpoint with the weights; found by default", default="")
OVERWRITE = Flag("overwrite", bool, default=False, help="replace the result of an earlier call")
THRESHOLD = "probability below which a pixel is background; default: that of each benchmark"


def _model_flags(kind: str) -> tuple[Flag, ...]:
    """The flags that all published models share."""
    tokenizer = f"folder of the tokenizer, or (downloaded) {TOKENIZERS[kind]}"
    return (
        Flag("checkpoint", help="file with the published weights"),
        Flag("out", required=True, help="model directory, or (--model) file, to write"),
        OVERWRITE,
        ENTRY,
        Flag("model", help="model directory to convert back, in place of --checkpoint"),
        Flag("to", default="pth", choices=tuple(WRITERS), help="of the file, with --model"),
        Flag("tokenizer", default="", help=tokenizer),
        Flag("grid", _two_numbers, help="rows,columns of stored positions; default square"),
        Flag("background_threshold", float, help=THRESHOLD),
        Flag("short_side", int, 448, help="images are segmented at this short side"),
        Flag("text_length", int, 77, help="tokens of a class prompt at most"),
    )


HEADS = "attention heads of the visual encoder"
BEFORE_AND_AFTER = (released.HEADS["heads"], released.HEADS["second_heads"])
TOWER = (
    Flag("checkpoint", required=True, help="file, or (bert) folder with pytorch_model.bin"),
    Flag("out", required=True, help="folder, or FILE.safetensors"),
    OVERWRITE,
    ENTRY,
)
KINDS = {
    "released": (
        *_model_flags("released"),
        Flag("heads", _two_numbers, BEFORE_AND_AFTER, f"{HEADS} before and after the binding"),
        Flag("decoder_heads", int, released.HEADS["decoder_heads"], "of the entity decoder"),
        Flag("text_heads", int, released.HEADS["text_heads"], "of the text encoder"),
    ),
    "groupvit": (
        *_model_flags("groupvit"),
        Flag("heads", int, groupvit.HEADS, HEADS),
        Flag("text_heads", int, 0, "of the text encoder; 0: one for 64 channels"),
    ),
    "dino": TOWER,
    "bert": TOWER,
}


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code."""
    kind, *rest = argv or [""]
    if kind in ("--help", "-h"):
        print(ABOUT)
        return 0
    if kind not in KINDS:
        names = ", ".join(KINDS)
        raise UserError(f"convert what? Say one of {names} first{flags.nearest(kind, list(KINDS))}")
    args = flags.parse(rest, KINDS[kind], ABOUT)
    out = Path(args.out)
    if kind in TOWERS:
        _convert_tower(kind, args, out)
    elif bool(args.checkpoint) == bool(args.model):
        raise UserError(f"convert {kind} takes exactly one of --checkpoint and --model")
    elif args.model:
        _from_model_dir(kind, args, out)
    else:
        _to_model_dir(kind, args, out)
    return 0


def _check_free(path: Path, overwrite: bool) -> None:
    """Raises UserError where a file or a model would be lost that may not be."""
    if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
        return
    if not (_is_converted(path) if path.is_dir() else is_written_here(path)):
        raise UserError(f"{path} is there and was not made by convert: choose another --out")
    if not overwrite:
        raise UserError(f"{path} is there already: choose another --out, or add --overwrite")


def _is_converted(directory: Path) -> bool:
    try:
        info = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        return CONVERTED in info["provenance"]
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _to_model_dir(kind: str, args: SimpleNamespace, out: Path) -> None:
    check_free(out)
    _check_free(out, args.overwrite)
    checkpoint = Path(args.checkpoint)
    read = read_checkpoint(checkpoint, args.entry)
    tensors, origin, teacher = read.tensors, str(checkpoint), {}
    settings = {"heads": args.heads, "text_heads": args.text_heads, "grid": args.grid}
    if kind == "released":
        settings["heads"], settings["second_heads"] = args.heads
        settings["decoder_heads"] = args.decoder_heads
        config, names = released.released_config(tensors, **settings), kind
        params, batch_stats, teacher = released.from_released(tensors, config, origin)
        unused = released.extra_tensors(tensors)
    else:
        config, names = groupvit.groupvit_config(tensors, **settings), groupvit.style_of(tensors)
        params, batch_stats = groupvit.from_groupvit(tensors, config, origin)
        unused = {name: tensors[name] for name in matching(tensors, groupvit.UNUSED)}
    tokenizer = find_tokenizer(args.tokenizer) if args.tokenizer else None
    vocabulary = config["text"]["vocab_size"]
    if tokenizer is not None and tokenizer.vocab_size > vocabulary:
        raise UserError(
            f"--tokenizer={args.tokenizer} has {tokenizer.vocab_size} tokens, {checkpoint} "
            f"only {vocabulary}: give the tokenizer that it was trained with"
        )
    protocol = named_protocol(kind).replace(short_side=args.short_side)
    if args.background_threshold is not None:
        protocol = protocol.replace(threshold=args.background_threshold, thresholds={})
    averages = flatten_dict(teacher or {}, sep="/")
    extras = {f"{UNUSED}/{name}": x for name, x in unused.items()}
    provenance = {
        "written_by": f"ovseg_jax {ovseg_jax.__version__}",
        CONVERTED: checkpoint.name,
        "sha256": file_digest(checkpoint),
        "entry": read.entry or "the whole file",
        NAMES: names,
        "settings": {key: str(value) for key, value in settings.items()},
        "tokenizer": args.tokenizer or "none",
        "kept_unused": sorted(unused),
        "dropped": list(read.left_out),
    }
    save_model(
        out,
        params,
        tokenizer,
        model=config,
        protocol=protocol.as_dict(),
        text_length=min(args.text_length, config["text"]["max_positions"]),
        benchmarks={},
        provenance=provenance,
        batch_stats=batch_stats,
        extras=extras | {f"{TEACHER}/{path}": x for path, x in averages.items()},
    )
    print(f"{len(tensors)} tensors read from {checkpoint}")
    if unused:
        modules = ", ".join(sorted({name.split(".")[0] for name in unused}))
        print(f"{len(unused)} of them are not used and are kept aside ({modules})")
    if teacher:
        print("with a moving average of the visual encoder, which is kept aside")
    _say_dropped(read)
    coarse = {x.dtype.name for x in tensors.values() if x.dtype.kind in "fV"} - {"float32"}
    if coarse:
        print(f"stored as float32 from now on: {', '.join(sorted(coarse))}")
    if tokenizer is None:
        print(
            "no tokenizer: weights hold no vocabulary. Before classes can be named, copy the "
            f"tokenizer's files to {out}, or convert with --tokenizer=DIR or, with a network, "
            f"--tokenizer={TOKENIZERS[kind]}"
        )
    print(f"model: {out}")


def _say_dropped(read: StateDict) -> None:
    if read.left_out:
        print(f"dropped, no tensors: {', '.join(read.left_out)}")


def _from_model_dir(kind: str, args: SimpleNamespace, out: Path) -> None:
    _check_free(out, args.overwrite)
    saved = load_model(args.model)
    extras: dict[str, Tensors] = {TEACHER: {}, UNUSED: {}}
    for name, value in saved.extras.items():
        group, _, rest = name.partition("/")
        extras.setdefault(group, {})[rest] = value
    model = saved.params, saved.batch_stats, saved.info["model"]
    if kind == "released":
        teacher = unflatten_dict(extras[TEACHER], sep="/") or None
        tensors = released.to_released(*model, teacher, extras[UNUSED])
    else:
        names = saved.info["provenance"].get(NAMES, groupvit.ORIGINAL)
        tensors = groupvit.to_groupvit(*model, names) | extras[UNUSED]
    write_checkpoint(out, tensors, args.to)
    print(f"{len(tensors)} tensors written to {out}")


def _convert_tower(kind: str, args: SimpleNamespace, out: Path) -> None:
    """Writes a tower's weights as safetensors, under the same names."""
    source = Path(args.checkpoint)
    if source.is_dir():
        source /= "pytorch_model.bin"
    file = out if out.suffix == ".safetensors" else out / "model.safetensors"
    _check_free(file, args.overwrite)
    copied = []
    if file.parent != source.parent and file != out:
        copied = [name for name in COMPANIONS if (source.parent / name).is_file()]
    for name in copied:
        old, new = file.parent / name, source.parent / name
        if os.path.lexists(old) and not (old.is_file() and file_digest(old) == file_digest(new)):
            raise UserError(f"{old} is there and is not {new}: choose another --out")
    read = read_checkpoint(source, args.entry)
    if not any(name.endswith(TOWERS[kind]) for name in read.tensors):
        first = ", ".join(list(read.tensors)[:3])
        raise UserError(f"{source} is no checkpoint that convert {kind} knows: it has {first}, ...")
    # Half precision becomes float32, in which everything is computed; the values are the same.
    half = {name for name, x in read.tensors.items() if x.itemsize < 4 and x.dtype.kind in "fV"}
    tensors = {n: x.astype(np.float32) if n in half else x for n, x in read.tensors.items()}
    write_checkpoint(file, tensors, "safetensors")
    print(f"{len(tensors)} tensors of {source} written to {file}")
    try:
        for name in copied:
            shutil.copyfile(source.parent / name, file.parent / name)
    except UNWRITABLE as error:
        raise cannot_write(file.parent / name, error) from None
    if copied:
        print(f"copied beside it: {', '.join(copied)}")
    _say_dropped(read)


if __name__ == "__main__":
    flags.run(main)
