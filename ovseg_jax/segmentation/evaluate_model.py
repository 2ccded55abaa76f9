"""Benchmarks from end to end: result files and pictures, of a run or of a model directory."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from ovseg_jax import flags
from ovseg_jax.errors import UserError
from ovseg_jax.files import check_writable
from ovseg_jax.segmentation.benchmarks import (
    FOLDER_FIELDS,
    ScenesBenchmark,
    benchmark_of,
    check_name,
)
from ovseg_jax.segmentation.calibrate import swept, train_split
from ovseg_jax.segmentation.evaluate import evaluate, gather_counts, write_result
from ovseg_jax.segmentation.protocol import Protocol, named_protocol, saved_protocol
from ovseg_jax.segmentation.report import extreme_images, write_page, write_sheet
from ovseg_jax.segmentation.retrieval import (
    WHOLE_IMAGES,
    model_facts,
    whole_image_results,
    whole_image_sets,
)
from ovseg_jax.segmentation.scores import ModelSegmenter, Segmenter
from ovseg_jax.weights.model_dir import load_model

Progress = Callable[[str, int, int], None]  # called with (benchmark, images done, images in all)


def run_benchmarks(
    segmenter: Segmenter,
    names: tuple[str, ...],
    config: ConfigDict,
    protocol: Protocol,
    results: Path,
    provenance: Mapping[str, Any],
    *,
    sweep: int = 0,
    pictures: int = 0,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluates on each benchmark and writes ``RESULTS/NAME.json``.

    Each of several processes takes its share of the images. All get the whole result, and the first
    writes it. What could not be written is in the result's field `not_written`. An unknown
    benchmark, missing files or a place that cannot be written are a UserError before any is run.

    Args:
      config: fields of the benchmarks under their names, and `batch_size`.
      provenance: plain values that say which model this was, added to each result.
      sweep: choose thresholds on this many training images, 0 to take the protocol's.
      pictures: how many of the best, median and worst images of each benchmark are drawn, in
        ``RESULTS/NAME.png`` and in an interactive ``RESULTS/NAME.html``.
    """
    # A name given twice is one benchmark.
    benchmarks = {name: benchmark_of(name, config) for name in names}
    tuned = {
        name: train_split(name, config, sweep)
        for name, benchmark in benchmarks.items()
        if sweep and benchmark.has_background
    }
    if sweep and not tuned:
        named = ", ".join(benchmarks)
        raise UserError(f"--sweep: none of the benchmarks ({named}) has a background: leave it out")
    part = jax.process_index(), jax.process_count()
    if part[0] == 0:
        check_writable(results)
    options = {"part": part, "gather": gather_counts, "batch_size": config.batch_size}
    results_by_name = {}
    for name, benchmark in benchmarks.items():
        chosen, extra = protocol, {}
        if name in tuned:
            chosen, extra = swept(segmenter, tuned[name], protocol.for_benchmark(name), **options)
        count = functools.partial(progress, name) if progress else None
        if count:
            count(0, len(benchmark))  # the rate is counted from here
        result = evaluate(segmenter, benchmark, chosen, progress=count, **options)
        results_by_name[name] = result = {**result, **extra, **provenance}
        if part[0] > 0:
            continue
        try:
            write_result(results / f"{name}.json", result)
            if pictures:
                which = result["image_miou"], pictures, config.batch_size
                if images := extreme_images(segmenter, benchmark, chosen, *which):
                    groups = result["group_usage"]["groups"]
                    write_sheet(images, benchmark, results / f"{name}.png", groups)
                    write_page(results / f"{name}.html", result, benchmark, images, groups)
        except UserError as error:
            # Hours of work: the caller prints the result, then says this.
            result["not_written"] = str(error)
    return results_by_name


def evaluate_model(
    model: str,
    names: tuple[str, ...],
    results: Path,
    *,
    data_dir: str = "",
    protocol_name: str = "",
    overrides: Sequence[tuple[str, str]] = (),
    sweep: int = 0,
    pictures: int = 0,
    progress: Progress | None = None,
) -> dict[str, dict[str, Any]]:
    """The results of a model directory by benchmark, see `run_benchmarks` (of those in `retrieval`
    every process evaluates all).

    Args:
      data_dir: folder with the official folders (or one of them) of those that have no `dir`.
      protocol_name: a named protocol, in place of the model's own.
      overrides: (key, text) pairs as `flags.parse` gives them. Keys are eval.protocol.FIELD,
        eval.batch_size, and eval.NAME.FIELD of the benchmarks asked for.
    """
    data_dir = os.path.expanduser(data_dir)
    masked = tuple(name for name in names if name not in WHOLE_IMAGES)
    for name in masked:
        check_name(name, WHOLE_IMAGES)
    unmasked = whole_image_sets(names, data_dir)
    if not masked:
        if overrides or protocol_name or sweep or pictures:
            which = "--config.*, --protocol, --sweep and --pictures are about label maps"
            raise UserError(f"{which}, and {' and '.join(WHOLE_IMAGES)} have none")
        if not unmasked:
            raise UserError("no benchmark named: --benchmark=NAME[,NAME...]")
        return whole_image_results(model, unmasked, results)
    saved = load_model(model)
    protocol = named_protocol(protocol_name) if protocol_name else saved_protocol(saved.info)
    scenes = {"scenes": dataclasses.asdict(ScenesBenchmark())}
    fields = FOLDER_FIELDS | scenes | saved.info["benchmarks"]
    fields = {name: dict(fields[name]) for name in masked}
    config = ConfigDict({"eval": {"batch_size": 0, "protocol": protocol.as_dict(), **fields}})
    for key, text in overrides:
        _check_applies(key, protocol, fields)
        flags.apply_override(config, key, text)
    for name in fields:
        if name in FOLDER_FIELDS and not config.eval[name].dir:
            config.eval[name].dir = data_dir
    if config.eval.batch_size < 0:
        raise UserError("config.eval.batch_size must be at least 1, or 0 to choose one")
    protocol = Protocol.from_config(config.eval.protocol.to_dict())
    segmenter = ModelSegmenter.of_saved(saved, protocol)
    config.eval.batch_size = segmenter.whole_batch(config.eval.batch_size)
    options = {"sweep": sweep, "pictures": pictures, "progress": progress}
    facts = model_facts(model, saved.info)
    of_masks = run_benchmarks(segmenter, masked, config.eval, protocol, results, facts, **options)
    return {**of_masks, **whole_image_results(model, unmasked, results)}


def _check_applies(key: str, protocol: Protocol, names: Iterable[str]) -> None:
    """Refuses a field of the protocol that a benchmark has a value of its own for."""
    field = key.removeprefix("eval.protocol.")
    for name in names:
        own = {f: f"per_benchmark.{name}.{f}" for f in protocol.per_benchmark.get(name, ())}
        if name in protocol.thresholds:
            own["threshold"] = f"thresholds.{name}"
        if field in own:
            why = f"does not apply to benchmark {name}, which has a value of its own"
            raise UserError(f"--config.{key} {why}: set --config.eval.protocol.{own[field]}")
