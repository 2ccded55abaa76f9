"""Train and evaluate: ``python -m ovseg_jax.main --config=configs/quickstart.py``."""

import hashlib
import logging
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

import ovseg_jax
from ovseg_jax import flags, processes
from ovseg_jax.errors import UserError
from ovseg_jax.platforms import enable_compilation_cache
from ovseg_jax.progress import Progress, duration, table
from ovseg_jax.segmentation import report
from ovseg_jax.segmentation.benchmarks import BENCHMARKS, FOLDER_FIELDS, benchmark_of
from ovseg_jax.segmentation.calibrate import calibrated, tune_split
from ovseg_jax.segmentation.evaluate import evaluate
from ovseg_jax.segmentation.evaluate_model import evaluate_model, run_benchmarks
from ovseg_jax.segmentation.protocol import NAMES, Protocol
from ovseg_jax.segmentation.retrieval import WHOLE_IMAGES
from ovseg_jax.segmentation.scores import ModelSegmenter
from ovseg_jax.train.config import load_config, plain
from ovseg_jax.train.loop import evaluation_params, train
from ovseg_jax.train.metrics import MetricsWriter, step_range
from ovseg_jax.train.resume import restored
from ovseg_jax.train.run import Run, make_run
from ovseg_jax.train.signals import Interrupted, print_stacks_on_signal
from ovseg_jax.train.step import TrainState
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
            where = Path(args.workdir or "runs/eval") / "results"
            results = evaluate_model(
                args.model,
                ("scenes",) if args.benchmark is None else tuple(args.benchmark),
                where,
                data_dir=args.data_dir or "",
                protocol_name=args.protocol or "",
                overrides=tuple(args.overrides),
                sweep=args.sweep,
                pictures=args.pictures,
                progress=progress.count,
            )
            return _print_results(results, where)
        if not args.config:
            raise UserError("no config: give --config=FILE.py")
        config = load_config(args.config, args.overrides)
        workdir = Path(args.workdir or f"runs/{Path(args.config.partition(':')[0]).stem}")
        names = tuple(args.benchmark or config.eval.benchmarks)
        if args.mode == "eval":
            run = make_run(config, progress)
            _, _, results = _evaluate_state(run, restored(run, workdir), names, workdir)
            return _print_results(results, workdir / "results")
        return _train(config, workdir, names, args.profile, progress)


def _train(
    config: ConfigDict,
    workdir: Path,
    names: tuple[str, ...],
    profile: tuple[int, int] | None,
    progress: Progress,
) -> int:
    start = time.monotonic()
    # Missing files are told before the training, not after it.
    for name in names:
        benchmark_of(name, config.eval)
    if names:
        tune_split(names[0], config.eval)
    try:
        run, state = train(config, workdir, progress, profile)
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
    # With the untrained model, which all processes make together.
    summary = _summary(run, protocol, results) if names else "no benchmark was asked for"
    if not processes.is_first():
        return 0
    print(summary, flush=True)  # before anything that a full disk may stop
    if unwritten:
        raise UserError(unwritten[0])
    pictures: Path | str = "none (config.eval.pictures = 0)"
    if names and config.eval.pictures:
        pictures = report.write_pictures(
            segmenter,
            benchmark_of(names[0], config.eval),
            protocol,
            workdir / "pictures",
            count=config.eval.pictures,
            group_count=config.model.image.num_groups,
        )
    print(
        f"\nmodel     {workdir / 'model'}\npictures  {pictures}\n"
        f"results   {workdir / 'results'}\nmetrics   {workdir / 'metrics.jsonl'}\n"
        f"time      {duration(time.monotonic() - start)} in all, {duration(trained)} of it "
        "training with caches and compilation"
    )
    return 0


def _evaluate_state(
    run: Run, state: TrainState, names: tuple[str, ...], workdir: Path
) -> tuple[ModelSegmenter, Protocol, dict[str, dict[str, Any]]]:
    """Calibrates on a tune split where there is one, evaluates, writes the result files."""
    config, step = run.config.eval, int(state.step)
    protocol = Protocol.from_config(config.protocol)
    segmenter = run.segmenter(evaluation_params(run, state), protocol, state.batch_stats)
    if not names:
        return segmenter, protocol, {}
    whole = run.config.to_json_best_effort(sort_keys=True)
    config_hash = hashlib.sha256(whole.encode()).hexdigest()[:12]
    provenance = {"step": step, "seed": run.config.seed, "config": config_hash}
    tune = tune_split(names[0], config)
    if tune is not None:
        protocol, miou = calibrated(segmenter, tune, protocol, config.batch_size)
        provenance["tune_miou"] = miou
    results = run_benchmarks(segmenter, names, config, protocol, workdir / "results", provenance)
    writer = MetricsWriter(workdir if processes.is_first() else None)
    for name, result in results.items():
        writer.write(step, {f"eval/{name}/miou": result["miou"]})
    writer.close()
    return segmenter, protocol, results


def _write_model(
    run: Run, state: TrainState, protocol: Protocol, results: dict, workdir: Path
) -> None:
    trained = (evaluation_params(run, state), state.batch_stats)
    params, batch_stats = jax.tree.map(processes.whole, trained)
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
            name: plain(config.eval[name])
            for name in results
            # A folder of this machine says nothing elsewhere.
            if name in config.eval and name not in FOLDER_FIELDS
        },
        provenance=provenance,
        batch_stats=batch_stats,
    )


def _summary(run: Run, protocol: Protocol, results: dict[str, dict[str, Any]]) -> str:
    """The table at the end of a run: this model, an untrained one, all background."""
    config, untrained = run.config.eval, {}
    if config.untrained:
        segmenter = run.segmenter(run.initial_params(announce=False), protocol)
        for name in results:
            tune, fitted = tune_split(name, config), protocol
            if tune is not None:
                fitted, _ = calibrated(segmenter, tune, protocol, config.batch_size)
            untrained[name] = evaluate(
                segmenter, benchmark_of(name, config), fitted, batch_size=config.batch_size
            )
    rows = [("mIoU, %", *results)]
    for label, key, of in (
        ("this model", "miou", results),
        ("  named classes", "miou_seen", results),
        ("  never named", "miou_unseen", results),
        ("untrained", "miou", untrained),
        ("all background", "all_background_miou", results),
    ):
        values = [of[name].get(key) for name in of]
        if label == "all background" or any(value is not None for value in values):
            rows.append((label, *map(report.number, values)))
    name, first = next(iter(results.items()))
    facts = [f"{key} {x:.3g}" for key, x in first["data"].items() if isinstance(x, float)]
    return f"\n{table(rows)}\n\n{name}: {', '.join(facts) or first['data'].get('title', '')}"


def _print_results(results: dict[str, dict[str, Any]], where: Path) -> int:
    if not processes.is_first():
        return 0
    pixels = {name: result for name, result in results.items() if "miou" in result}
    whole = [result for result in results.values() if "miou" not in result]
    if pixels:
        print("\n".join(report.protocol_lines(pixels)))
        print(f"\n{table(report.result_rows(pixels))}\n")
    for result in whole:
        print("\n".join(report.whole_image_lines(result)))
        print(f"\n{table(report.whole_image_rows(result))}\n")
    for name, result in pixels.items():
        for line in report.remarks(result):
            print(f"{name}: {line}")
    for result in pixels.values():
        if rows := report.comparison_rows(result):
            print(f"\n{table(rows)}")
    print(f"\nresults   {where}", flush=True)
    for result in results.values():
        if "not_written" in result:
            raise UserError(result["not_written"])
    return 0


if __name__ == "__main__":
    flags.run(main)
