"""A benchmark run from end to end: calibration, result file, pictures."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from PIL import Image

from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.benchmarks import Benchmark, make_benchmark
from ovseg_jax.segmentation.calibrate import calibrate
from ovseg_jax.segmentation.evaluate import evaluate, scored_benchmark, write_result
from ovseg_jax.segmentation.labels import label_maps
from ovseg_jax.segmentation.pictures import contact_sheet, scene_panel
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.segmentation.scores import Segmenter, image_scores, with_scale, without_index

# Scales of the softmax over classes that calibration tries.
SCALES = (5.0, 7.0, 10.0, 14.0, 20.0, 30.0, 45.0)


def benchmark_of(name: str, config: ConfigDict, **changes: Any) -> Benchmark:
    """A benchmark with the fields of ``config.eval.NAME`` (where there are any) and `changes`."""
    fields: Mapping[str, Any] = config.get(name, {}) or {}
    return make_benchmark(name, {**dict(fields), **changes})


def calibrated(
    segmenter: Segmenter, tune: Benchmark, protocol: Protocol, batch_size: int
) -> tuple[Protocol, float]:
    """The protocol with scales and threshold chosen on a tune split, and the mIoU (percent) there.

    Never pass the split that is reported. A protocol of one group per pixel keeps its own scale and
    threshold: it is only measured.
    """
    if protocol.grouping == "one_group":
        result = evaluate(segmenter, tune, protocol, batch_size=batch_size)
        return protocol, result["miou"]
    pairs = scored_benchmark(segmenter, tune, protocol, batch_size=batch_size)
    best = calibrate(pairs, SCALES, order=protocol.order)
    chosen = protocol.replace(
        scale=best.scale, image_scale=best.image_scale, threshold=best.threshold
    )
    return chosen, 100.0 * best.miou


def run_benchmarks(
    segmenter: Segmenter,
    names: tuple[str, ...],
    config: ConfigDict,
    protocol: Protocol,
    results: Path | None,
    provenance: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Evaluates on each benchmark and writes ``RESULTS/NAME.json`` (where `results` is given).

    Args:
      config: fields of the benchmarks under their names, and `batch_size`.
      provenance: plain values added to each result: which model this was.

    Raises:
      UserError: an unknown benchmark, before any is run.
    """
    benchmarks = {name: benchmark_of(name, config) for name in names}
    if not benchmarks:
        raise UserError("no benchmark named: --benchmark=NAME[,NAME...]")
    found = {}
    for name, benchmark in benchmarks.items():
        result = evaluate(segmenter, benchmark, protocol, batch_size=config.batch_size)
        found[name] = {**result, **provenance}
        if results is not None:
            write_result(results / f"{name}.json", found[name])
    return found


def write_pictures(
    segmenter: Segmenter,
    benchmark: Benchmark,
    protocol: Protocol,
    directory: Path,
    *,
    count: int,
    group_count: int,
) -> Path:
    """One panel per image (image, groups, prediction, truth) and a sheet of all of them.

    Args:
      count: how many images, from the first on.

    Returns:
      The path of the sheet, ``DIRECTORY/NAME.png``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    protocol = with_scale(protocol, segmenter)
    count = min(count, len(benchmark))
    images = [benchmark[index] for index in range(count)]
    text = segmenter.text(list(benchmark.class_names), protocol.templates)
    scored = image_scores(
        without_index(segmenter.encode), text, (image for image, _ in images), protocol, count
    )
    panels: dict[int, Image.Image] = {}
    for scores, labels in label_maps(scored, protocol, group=count):
        image, truth = images[scores.index]
        panels[scores.index] = scene_panel(
            image,
            scores.group_map(),
            labels,
            truth,
            benchmark.class_names,
            background=benchmark.has_background,
            group_count=group_count,
        )
    rows = [panels[index] for index in sorted(panels)]
    for index, panel in enumerate(rows):
        panel.save(directory / f"{benchmark.name}_{index:03d}.png")
    sheet = directory / f"{benchmark.name}.png"
    contact_sheet(rows, columns=2 if len(rows) > 3 else 1).save(sheet)
    return sheet


def tune_split(name: str, config: ConfigDict) -> Benchmark | None:
    """The benchmark's tune split, where it has one and the config asks to calibrate."""
    if not config.calibrate:
        return None
    test = benchmark_of(name, config)
    fields = (
        {field.name for field in dataclasses.fields(test)}
        if dataclasses.is_dataclass(test)
        else set()
    )
    if "split" not in fields:
        return None
    return benchmark_of(name, config, split="tune", count=config.tune_count)
