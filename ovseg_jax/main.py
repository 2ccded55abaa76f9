"""Train and evaluate: ``python -m ovseg_jax.main --config=configs/quickstart.py``."""

import json
import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
from ml_collections import ConfigDict

import ovseg_jax
from ovseg_jax import flags, processes
from ovseg_jax.errors import UserError
from ovseg_jax.platforms import enable_compilation_cache
from ovseg_jax.progress import Progress, duration, table
from ovseg_jax.segmentation.benchmarks import BENCHMARKS, FOLDER_FIELDS, benchmark_of
from ovseg_jax.segmentation.calibrate import calibrated, tune_split
from ovseg_jax.segmentation.evaluate import evaluate
from ovseg_jax.segmentation.evaluate_model import evaluate_model, run_benchmarks
from ovseg_jax.segmentation.page import write_pictures
from ovseg_jax.segmentation.protocol import NAMES, Protocol
from ovseg_jax.segmentation.report import (
    comparison_rows,
    number,
    protocol_lines,
    remarks,
    result_rows,
    whole_image_lines,
    whole_image_rows,
)
from ovseg_jax.segmentation.retrieval import WHOLE_IMAGES
from ovseg_jax.segmentation.segmenter import ModelSegmenter
from ovseg_jax.train.config import load_config
from ovseg_jax.train.loop import evaluation_params, train
from ovseg_jax.train.metrics import MetricsWriter, step_range
from ovseg_jax.train.resume import changed_fields, plain, restored
from ovseg_jax.train.run import Run, config_hash, make_run
from ovseg_jax.train.signals import Interrupted, print_stacks_on_signal
from ovseg_jax.train.state import TrainState
from ovseg_jax.weights.initialize import architecture
from ovseg_jax.weights.model_dir import save_model

ABOUT = """Learn to segment from captions, or evaluate what was learned.

Train:     python -m ovseg_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
           ... --processes=2 --process_id=0 --coordinator=HOST:PORT            (one of several)
           Exits with 0 when done, 2 after an error that somebody has to look at, 130 after Ctrl-C,
           143 after SIGTERM and whatever else the same command, given again, gets past.
Evaluate:  python -m ovseg_jax.main --mode=eval --config=... --workdir=...     (a run)
           python -m ovseg_jax.main --mode=eval --model=DIR [--benchmark=a,b]  (a model directory)
           ... --benchmark=voc,ade20k --data_dir=DIR [--protocol=released]     (official folders)
"""

KNOWN = ", ".join((*BENCHMARKS, *WHOLE_IMAGES))

FLAGS = (
    flags.Flag("config", help="config file, FILE.py or FILE.py:variant"),
    flags.Flag("workdir", help="where the run writes; default runs/NAME_OF_CONFIG"),
    flags.Flag("mode", default="train", choices=("train", "eval"), help="what to do"),
    flags.Flag("model", help="model directory (or photos) to evaluate, in place of --config"),
    flags.Flag("benchmark", flags.comma_list, help=f"what to evaluate on: {KNOWN}"),
    flags.Flag("data_dir", help="folder with the benchmarks' official folders, or one of them"),
    flags.Flag("protocol", help=f"how to evaluate, in place of the model's: {', '.join(NAMES)}"),
    flags.Flag("sweep", int, default=0, help="images of training splits to choose thresholds on"),
    flags.Flag("pictures", int, default=0, help="best, median and worst images to draw, each"),
    *processes.FLAGS,
    flags.Flag("profile", step_range, help="START:STOP, steps to trace into WORKDIR/profile"),
)


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code."""
    args = flags.parse(argv, FLAGS, ABOUT)
    if args.mode == "train" and args.model:
        raise UserError("--model is for --mode=eval; training takes --config and --workdir")
    if args.mode == "eval" and bool(args.model) == bool(args.config):
        raise UserError("--mode=eval takes exactly one of --config (with --workdir) and --model")
    of_model = args.data_dir or args.protocol or args.sweep or args.pictures
    if of_model and not args.model:
        raise UserError(
            "--data_dir, --protocol, --sweep and --pictures go with --mode=eval --model=DIR; a run "
            "has its benchmarks and its protocol in its config (config.eval)"
        )
    if min(args.sweep, args.pictures) < 0:
        raise UserError("--sweep and --pictures are numbers of images, at least 0")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    processes.join(args)
    enable_compilation_cache()
    print_stacks_on_signal()
    progress = Progress(quiet=not processes.is_first())
    with processes.leaving_at_once():
        if args.model:
            return _evaluate_model(args, progress)
        if not args.config:
            raise UserError("no config: give --config=FILE.py")
        config = load_config(args.config, args.overrides)
        workdir = Path(args.workdir or f"runs/{Path(args.config.partition(':')[0]).stem}")
        if args.mode == "eval":
            return _evaluate_run(config, workdir, args, progress)
        return _train(config, workdir, args, progress)


def _train(config: ConfigDict, workdir: Path, args: SimpleNamespace, progress: Progress) -> int:
    start = time.monotonic()
    names = tuple(args.benchmark or config.eval.benchmarks)
    # Missing files are told before the training, not after it.
    for name in names:
        benchmark_of(name, config.eval)
    if names:
        tune_split(names[0], config.eval)
    try:
        run, state = train(config, workdir, progress, args.profile)
    except Interrupted as stop:
        progress.say(str(stop))
        return stop.exit_code
    trained = time.monotonic() - start
    progress.say(f"trained in {duration(trained)}; evaluating")
    segmenter, protocol, results = _evaluate_state(run, state, names, workdir)
    unwritten = [result["not_written"] for result in results.values() if "not_written" in result]
    try:
        _write_model(run, state, protocol, results, workdir)
    except UserError as error:
        unwritten.append(str(error))
    if not names:
        if unwritten:
            raise UserError(unwritten[0])
        progress.say(f"model: {workdir / 'model'}; no benchmark was asked for")
        return 0
    # With the untrained model, which all processes make together.
    summary = _summary(run, names, protocol, results, config)
    if processes.is_first():
        print(summary, flush=True)  # before anything that a full disk may stop
        if unwritten:
            raise UserError(unwritten[0])
        sheet: Path | str = "none (config.eval.pictures = 0)"
        if config.eval.pictures:
            sheet = write_pictures(
                segmenter,
                benchmark_of(names[0], config.eval),
                protocol,
                workdir / "pictures",
                count=config.eval.pictures,
                group_count=config.model.image.num_groups,
            )
        print(
            f"\nmodel     {workdir / 'model'}\npictures  {sheet}\n"
            f"results   {workdir / 'results'}\nmetrics   {workdir / 'metrics.jsonl'}\n"
            f"time      {duration(time.monotonic() - start)} in all, {duration(trained)} of it "
            "training with caches and compilation"
        )
    return 0


def _evaluate_state(
    run: Run, state: TrainState, names: tuple[str, ...], workdir: Path
) -> tuple[ModelSegmenter, Protocol, dict[str, dict[str, Any]]]:
    """Calibrates on a tune split where there is one, evaluates, writes the result files."""
    config = run.config.eval
    protocol = Protocol.from_config(config.protocol)
    segmenter = run.segmenter(evaluation_params(run, state), protocol, state.batch_stats)
    tune = tune_split(names[0], config) if names else None
    tuned = {}
    if tune is not None:
        protocol, miou = calibrated(segmenter, tune, protocol, config.batch_size)
        tuned = {"tune_miou": miou}
    if not names:
        return segmenter, protocol, {}
    step = int(state.step)
    provenance = {"step": step, "seed": run.config.seed, "config": config_hash(run.config), **tuned}
    results = run_benchmarks(segmenter, names, config, protocol, workdir / "results", provenance)
    writer = MetricsWriter(workdir if processes.is_first() else None)
    for name, result in results.items():
        writer.write(step, {f"eval/{name}/miou": result["miou"]})
    writer.close()
    return segmenter, protocol, results


def _write_model(
    run: Run, state: TrainState, protocol: Protocol, results: dict, workdir: Path
) -> None:
    params = jax.tree.map(processes.whole, evaluation_params(run, state))
    batch_stats = jax.tree.map(processes.whole, state.batch_stats)
    if not processes.is_first():
        return
    config = run.config
    provenance = {
        "written_by": f"ovseg_jax {ovseg_jax.__version__}",
        "trained_on": f"{run.source.name} ({len(run.source)} records, {run.source.fingerprint()})",
        "steps": int(state.step),
        "seed": config.seed,
        "image_init": config.model.image_init or "random",
        "text_init": config.model.text_init or "random",
        **{f"miou_{name}": result["miou"] for name, result in results.items()},
    }
    save_model(
        workdir / "model",
        params,
        run.tokenizer,
        model=architecture(config.model),
        protocol=protocol.as_dict(),
        text_length=run.prompt_length(),
        benchmarks={
            name: json.loads(config.eval[name].to_json_best_effort())
            for name in results
            # A folder of this machine says nothing elsewhere.
            if name in config.eval and name not in FOLDER_FIELDS
        },
        provenance=provenance,
        batch_stats=batch_stats,
    )


def _summary(
    run: Run, names: tuple[str, ...], protocol: Protocol, results: dict, config: ConfigDict
) -> str:
    """The table at the end of a run: this model, an untrained one, all background."""
    untrained = {}
    if config.eval.untrained:
        segmenter = run.segmenter(run.initial_params(announce=False), protocol)
        for name in names:
            tune = tune_split(name, config.eval)
            fitted = protocol
            if tune is not None:
                fitted, _ = calibrated(segmenter, tune, protocol, config.eval.batch_size)
            benchmark = benchmark_of(name, config.eval)
            untrained[name] = evaluate(
                segmenter, benchmark, fitted, batch_size=config.eval.batch_size
            )
    rows = [("mIoU, %", *names)]
    rows.append(("this model", *(number(results[name]["miou"]) for name in names)))
    for key, label in (("miou_seen", "  named classes"), ("miou_unseen", "  never named")):
        if any(results[name].get(key) is not None for name in names):
            rows.append((label, *(number(results[name].get(key)) for name in names)))
    if untrained:
        rows.append(("untrained", *(number(untrained[name]["miou"]) for name in names)))
    rows.append(("all background", *(number(results[n].get("all_background_miou")) for n in names)))
    data = results[names[0]]["data"]
    facts = ", ".join(
        f"{key} {value:.3g}" for key, value in data.items() if isinstance(value, float)
    )
    return f"\n{table(rows)}\n\n{names[0]}: {facts or data.get('title', '')}"


def _evaluate_run(
    config: ConfigDict, workdir: Path, args: SimpleNamespace, progress: Progress
) -> int:
    if not (workdir / "checkpoints" / "latest").is_dir():
        raise UserError(
            f"--workdir={workdir} holds no checkpoint: train first, or give --model=DIR"
        )
    _refuse_other_training(config, workdir)
    run = make_run(config, progress)
    state = restored(run, workdir)
    names = tuple(args.benchmark or config.eval.benchmarks)
    _, _, results = _evaluate_state(run, state, names, workdir)
    _print_results(results, workdir / "results")
    return 0


def _refuse_other_training(config: ConfigDict, workdir: Path) -> None:
    """An evaluation of a run takes only its config.eval from the command line."""
    try:
        trained = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    changes = [
        line
        for line in changed_fields(trained, plain(config))
        # Fields that only one version of this program has.
        if not line.startswith("config.eval")
        and ": absent -> " not in line
        and (line.startswith("config.phases") or not line.endswith(" -> absent"))
    ]
    if changes:
        raise UserError(
            f"an evaluation changes config.eval alone, but the run in {workdir} was trained with "
            "other settings (trained -> given now):\n  " + "\n  ".join(changes[:20])
        )


def _evaluate_model(args: SimpleNamespace, progress: Progress) -> int:
    workdir = Path(args.workdir or "runs/eval")
    results = evaluate_model(
        args.model,
        ("scenes",) if args.benchmark is None else tuple(args.benchmark),
        workdir / "results",
        data_dir=args.data_dir or "",
        protocol_name=args.protocol or "",
        overrides=tuple(args.overrides),
        sweep=args.sweep,
        pictures=args.pictures,
        progress=progress.count,
    )
    _print_results(results, workdir / "results")
    return 0


def _print_results(results: dict[str, dict[str, Any]], where: Path) -> None:
    if not processes.is_first():
        return
    whole = {name: result for name, result in results.items() if "miou" not in result}
    results = {name: result for name, result in results.items() if name not in whole}
    if results:
        print("\n".join(protocol_lines(results)))
        print(f"\n{table(result_rows(results))}\n")
    for result in whole.values():
        print("\n".join(whole_image_lines(result)))
        print(f"\n{table(whole_image_rows(result))}\n")
    for line in remarks(results):
        print(line)
    for result in results.values():
        if rows := comparison_rows(result):
            print(f"\n{table(rows)}")
    print(f"\nresults   {where}", flush=True)
    for result in (*results.values(), *whole.values()):
        if "not_written" in result:
            raise UserError(result["not_written"])


if __name__ == "__main__":
    flags.run(main)
