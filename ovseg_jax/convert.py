"""Published weights into files that everything else here reads, and back.

``python -m ovseg_jax.convert released --checkpoint=FILE.pth --out=MODEL_DIR --tokenizer=DIR``
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ovseg_jax import flags
from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.protocol import named_protocol
from ovseg_jax.weights.conversion import (
    TOKENIZERS,
    Settings,
    from_model_dir,
    to_model_dir,
    tower_to_safetensors,
)
from ovseg_jax.weights.published_config import GROUPVIT_HEADS, RELEASED_HEADS
from ovseg_jax.weights.tensors import WRITERS

ABOUT = """Convert published weights. Files that would run code are refused.

  convert released --checkpoint=FILE --out=MODEL_DIR    the released OVSegmentor
  convert released --model=MODEL_DIR --to=pth --out=FILE.pth    and back, to the bit
  convert groupvit --checkpoint=FILE --out=MODEL_DIR    GroupViT, its authors' or Hugging Face's
  convert dino     --checkpoint=FILE.pth --out=DIR      a visual trunk, for config.model.image_init
  convert bert     --checkpoint=FILE.bin --out=DIR      a text encoder, for config.model.text_init

FILE is .npz, .safetensors or, with PyTorch (pip install ".[convert]"), .pth, .pt, .bin or .ckpt.
`convert KIND --help` lists the flags.
"""


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


_whole_numbers.__name__ = "list of whole numbers"

ENTRY = flags.Flag(
    "entry", default="", help="entry of the checkpoint that holds the weights; found by default"
)


def _model_flags(kind: str) -> tuple[flags.Flag, ...]:
    """The flags that all published models share."""
    return (
        flags.Flag("checkpoint", help="file with the published weights"),
        flags.Flag("out", required=True, help="model directory, or (--model) file, to write"),
        ENTRY,
        flags.Flag("model", help="model directory to convert back, in place of --checkpoint"),
        flags.Flag("to", default="pth", choices=tuple(WRITERS), help="of the file, with --model"),
        flags.Flag(
            "tokenizer",
            default="",
            help=f"folder of the tokenizer, or (downloaded) {TOKENIZERS[kind]}",
        ),
        flags.Flag("grid", _whole_numbers, help="rows,columns of stored positions; default square"),
        flags.Flag(
            "background_threshold",
            float,
            help="probability below which a pixel is background; default: that of each benchmark",
        ),
        flags.Flag("short_side", int, default=448, help="images are segmented at this short side"),
        flags.Flag("text_length", int, default=77, help="tokens of a class prompt at most"),
    )


RELEASED = (
    *_model_flags("released"),
    flags.Flag(
        "heads",
        _whole_numbers,
        default=(RELEASED_HEADS["heads"], RELEASED_HEADS["second_heads"]),
        help="attention heads of the visual encoder before and after the binding",
    ),
    *(
        flags.Flag(
            f"{name}_heads", int, default=RELEASED_HEADS[f"{name}_heads"], help=f"of the {what}"
        )
        for name, what in (("decoder", "entity decoder"), ("text", "text encoder"))
    ),
)
GROUPVIT = (
    *_model_flags("groupvit"),
    flags.Flag(
        "heads",
        int,
        default=GROUPVIT_HEADS,
        help="attention heads of the visual encoder",
    ),
    flags.Flag("text_heads", int, default=0, help="of the text encoder; 0: one for 64 channels"),
    flags.Flag("activation", default="quick_gelu", help="of the text encoder"),
)
TOWER = (
    flags.Flag("checkpoint", required=True, help="file, or (bert) folder with pytorch_model.bin"),
    flags.Flag("out", required=True, help="folder, or FILE.safetensors"),
    ENTRY,
)


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code."""
    kind, *rest = argv or [""]
    if kind in ("--help", "-h"):
        print(ABOUT)
        return 0
    if kind not in KINDS:
        names = ", ".join(KINDS)
        raise UserError(f"convert what? Say one of {names} first{flags.nearest(kind, list(KINDS))}")
    spec, run = KINDS[kind]
    for line in run(kind, flags.parse(rest, spec, ABOUT)):
        print(line)
    return 0


def _released(kind: str, args: SimpleNamespace) -> list[str]:
    heads = _pair("heads", args.heads)
    settings = {"heads": heads[0], "second_heads": heads[1], "decoder_heads": args.decoder_heads}
    return _model(kind, args, {**settings, "text_heads": args.text_heads})


def _groupvit(kind: str, args: SimpleNamespace) -> list[str]:
    settings = {name: getattr(args, name) for name in ("heads", "text_heads", "activation")}
    return _model(kind, args, settings)


def _model(kind: str, args: SimpleNamespace, settings: dict[str, Any]) -> list[str]:
    out = Path(args.out)
    if bool(args.checkpoint) == bool(args.model):
        raise UserError(f"convert {kind} takes exactly one of --checkpoint and --model")
    if args.model:
        return from_model_dir(kind, Path(args.model), out, args.to)
    protocol = named_protocol(kind).replace(short_side=args.short_side)
    if args.background_threshold is not None:
        protocol = protocol.replace(threshold=args.background_threshold, thresholds={})
    everything = Settings(
        model={**settings, "grid": args.grid and _pair("grid", args.grid)},
        protocol=protocol.as_dict(),
        tokenizer=args.tokenizer,
        text_length=args.text_length,
    )
    lines = to_model_dir(kind, Path(args.checkpoint), out, everything, args.entry)
    return [*lines, f"model: {out}"]


def _pair(flag: str, numbers: Sequence[int]) -> tuple[int, int]:
    if len(numbers) != 2 or min(numbers) < 1:
        raise UserError(f"--{flag} takes two whole numbers, for example --{flag}=8,8")
    return numbers[0], numbers[1]


def _tower(kind: str, args: SimpleNamespace) -> list[str]:
    return tower_to_safetensors(kind, Path(args.checkpoint), Path(args.out), args.entry)


KINDS: dict[str, tuple[Sequence[flags.Flag], Callable[[str, SimpleNamespace], list[str]]]] = {
    "released": (RELEASED, _released),
    "groupvit": (GROUPVIT, _groupvit),
    "dino": (TOWER, _tower),
    "bert": (TOWER, _tower),
}


if __name__ == "__main__":
    flags.run(main)
