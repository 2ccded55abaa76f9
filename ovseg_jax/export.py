"""A run, or a step of it, as a model directory, and models as StableHLO.

``python -m ovseg_jax.export --workdir=runs/quickstart --out=MODEL_DIR --step=best --weights=ema``
"""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

import ovseg_jax
from ovseg_jax import flags
from ovseg_jax.data.tokenizer import Tokenizer, find_tokenizer
from ovseg_jax.errors import UserError
from ovseg_jax.flags import Flag
from ovseg_jax.models.build import build_model, variable_shapes
from ovseg_jax.segmentation.protocol import Protocol, saved_protocol
from ovseg_jax.segmentation.stablehlo import check_can_be_written, write_programs
from ovseg_jax.train.resume import SavedRun, read_run
from ovseg_jax.weights.initialize import architecture, split_towers
from ovseg_jax.weights.model_dir import check_free, load_model, save_model
from ovseg_jax.weights.weight_files import HUB, PACKAGE, TOKENIZER, Reference, refer

ABOUT = """Write a model directory from a run.

  export --workdir=RUN --out=MODEL_DIR [--step=N|best|latest] [--weights=online|ema]
  export --workdir=RUN --out=MODEL_DIR --stablehlo     with programs in MODEL_DIR/stablehlo
  export --model=MODEL_DIR --out=DIR --stablehlo       the programs of a model directory
  export --workdir=RUN --out=MODEL_DIR --towers=reference    without the published weights

`best` is the checkpoint with the highest mIoU on the tune split of the run's first benchmark,
never on a split that is reported. --weights=ema takes the teacher's visual encoder, the rest is
online. With --towers=reference the directory holds what training changed and segmentation uses (so
no entity decoder), and says where the published weights are (package, version, SHA-256).
--dtype=float16 halves the file; weights are read as float32.
"""

FLAGS = (
    Flag("workdir", help="work directory of a run"),
    Flag("model", help="model directory, in place of --workdir, with --stablehlo"),
    Flag("out", required=True, help="model directory to write"),
    Flag("step", default="latest", help="latest, best or a number"),
    Flag("weights", default="online", choices=("online", "ema"), help="of the visual encoder"),
    Flag("towers", default="copied", choices=("copied", "reference"), help="published weights"),
    Flag("dtype", default="float32", choices=("float32", "float16"), help="of the file's weights"),
    Flag("name", default="", help="of the model, for its README"),
    Flag("terms", default="", help="of use, for its README"),
    Flag("stablehlo", bool, False, help="also write StableHLO programs"),
    Flag("image_size", int, 0, help="of StableHLO, pixels; 0: the protocol's window"),
)


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code."""
    args = flags.parse(argv, FLAGS, ABOUT)
    if bool(args.workdir) == bool(args.model):
        raise UserError("export takes exactly one of --workdir and --model")
    out = Path(args.out)
    # Before anything that takes time.
    if args.stablehlo:
        check_can_be_written()
    if args.model:
        if not args.stablehlo:
            raise UserError("--model is a model directory already; say --stablehlo, or --workdir")
        _programs(args.model, out, args)
        return 0
    check_free(out)
    _write(read_run(Path(args.workdir), args.step), Path(args.workdir), out, args)
    if args.stablehlo:
        _programs(out, out / "stablehlo", args)
    return 0


def _write(run: SavedRun, workdir: Path, out: Path, args: SimpleNamespace) -> None:
    config, position, weights = run.config, run.position, args.weights
    step = position["step"]
    which = f"step {step}, {weights} weights"
    told = {"name": args.name, "terms": args.terms, "command": _command(workdir)}
    provenance: dict[str, Any] = {
        **{key: value for key, value in told.items() if value},
        "written_by": f"ovseg_jax {ovseg_jax.__version__}",
        "run": workdir.name,
        "steps": step,
        "weights": weights,
        "seed": config.seed,
        "image_init": config.model.image_init or "random",
        "text_init": config.model.text_init or "random",
    }
    if "miou" in position:
        metric = position.get("metric", "mIoU on a tune split")
        provenance |= {"chosen_by": metric, "chosen_score": position["miou"]}
        which += f", best by {metric} ({position['miou']:.1f} %)"
    protocol, benchmarks, finished = config.eval.protocol, {}, None
    if (workdir / "model" / "config.json").is_file():
        finished = json.loads((workdir / "model" / "config.json").read_text(encoding="utf-8"))
        protocol, benchmarks = saved_protocol(finished).as_dict(), finished["benchmarks"]
        if benchmarks:
            provenance["protocol_from"] = "the calibration at the end of the run"
        told = finished["provenance"]
        provenance |= {key: told[key] for key in ("trained_on",) if key in told}
        # The scores are those of the weights that were evaluated.
        if (told.get("steps"), config.eval.weights) == (step, weights):
            provenance |= {key: value for key, value in told.items() if key.startswith("miou_")}
    length = position.get("text_length") or config.data.text_length
    if not length and finished is None:
        raise UserError(f"{workdir} does not say how long its texts are: finish the run first")
    params, statistics = jax.device_get((run.params(weights), run.state.batch_stats))
    model, spec, towers = config.model, config.data.tokenizer, {}
    tokenizer: Tokenizer | Reference = find_tokenizer(spec)
    if args.towers == "reference":
        model = config.model.copy_and_resolve_references()
        model.decoder, model.token_classes = None, 0
        shapes = variable_shapes(build_model(model))
        modules = {path.split("/")[0] for path in shapes}
        params, statistics = (
            {k: x for k, x in flatten_dict(tree, sep="/").items() if k.split("/")[0] in modules}
            for tree in (params, statistics)
        )
        kept, towers = split_towers(model, params, shapes)
        params, statistics = (unflatten_dict(flat, sep="/") for flat in (kept, statistics))
        if spec.startswith((PACKAGE, HUB)):
            tokenizer = refer(spec, TOKENIZER)
    save_model(
        out,
        params,
        tokenizer,
        model=architecture(model),
        protocol=Protocol.from_config(protocol).as_dict(),
        text_length=max(16, length) if length else finished["text_length"],
        benchmarks=benchmarks,
        provenance=provenance,
        batch_stats=statistics,
        towers=towers,
        dtype=args.dtype,
    )
    print(f"model: {out} ({which})")


def _command(workdir: Path) -> str:
    """The command that trained a run, "" where it is not known."""
    try:
        versions = json.loads((workdir / "versions.json").read_text(encoding="utf-8"))
        return shlex.join(["python", "-m", "ovseg_jax.main", *versions["command"][1:]])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _programs(model: str | Path, out: Path, args: SimpleNamespace) -> None:
    saved = load_model(model)
    protocol = saved_protocol(saved.info)
    size = args.image_size or protocol.window
    signature = write_programs(saved, protocol, out, size)
    print(f"StableHLO: {out}, images of {size} x {size}, for {', '.join(signature['platforms'])}")


if __name__ == "__main__":
    flags.run(main)
