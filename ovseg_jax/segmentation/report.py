"""A benchmark run from end to end: calibration, result file, pictures."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from PIL import Image

from ovseg_jax.data.benchmarks import class_table
from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.benchmarks import Benchmark, Every, make_benchmark
from ovseg_jax.segmentation.calibrate import calibrate
from ovseg_jax.segmentation.chosen import chosen_images, write_sheet
from ovseg_jax.segmentation.class_words import words_of
from ovseg_jax.segmentation.evaluate import evaluate, scored_benchmark, write_result
from ovseg_jax.segmentation.html_report import write_report
from ovseg_jax.segmentation.labels import label_maps
from ovseg_jax.segmentation.official import FOLDERS
from ovseg_jax.segmentation.parts import gather_counts, this_part
from ovseg_jax.segmentation.pictures import contact_sheet, scene_panel
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.segmentation.scores import Segmenter, image_scores, with_scale, without_index
from ovseg_jax.segmentation.sweep import swept

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

    Never pass the split that is reported. A protocol of one group per pixel, or one that refines,
    keeps its own scale and threshold: it is only measured.
    """
    plain = protocol.averaged == "probabilities" and not (protocol.refined or protocol.min_area)
    if protocol.grouping == "one_group" or not plain:
        result = evaluate(segmenter, tune, protocol, batch_size=batch_size)
        return protocol, result["miou"]
    # Without a threshold no everyday words would compete, as they will once there is one.
    protocol = protocol.replace(threshold=protocol.threshold or 0.0)
    owners = words_of(tune, protocol)[0].owners
    pairs = scored_benchmark(segmenter, tune, protocol, batch_size=batch_size)
    cap = protocol.cap_threshold
    best = calibrate(pairs, SCALES, order=protocol.order, owners=owners, cap=cap)
    chosen = protocol.replace(
        scale=best.scale,
        image_scale=best.image_scale,
        threshold=best.threshold,
        competing_words=len(owners),
    )
    return chosen, 100.0 * best.miou


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
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluates on each benchmark and writes ``RESULTS/NAME.json``.

    Several processes each take their part of the images, and all have the whole result; the first
    writes it.

    Args:
      config: fields of the benchmarks under their names, and `batch_size`.
      provenance: plain values added to each result: which model this was.
      sweep: choose the threshold of each benchmark with a background on this many images of its
        training split; 0 to take the protocol's.
      pictures: this many best, median and worst images of each benchmark are drawn, in
        ``RESULTS/NAME.png`` and in an interactive ``RESULTS/NAME.html``.
      progress: called with (benchmark, images done, images of this process).

    Raises:
      UserError: an unknown benchmark, or missing files, before any is run.
    """
    # A name given twice is one benchmark.
    benchmarks = {name: benchmark_of(name, config) for name in names}
    if not benchmarks:
        raise UserError("no benchmark named: --benchmark=NAME[,NAME...]")
    tuned = {
        name: train_split(name, config, sweep)
        for name, benchmark in benchmarks.items()
        if sweep and benchmark.has_background
    }
    if sweep and not tuned:
        raise UserError(
            "--sweep chooses thresholds of the background, and none of the benchmarks "
            f"({', '.join(benchmarks)}) has one: leave it out"
        )
    parts = {"part": this_part(), "gather": gather_counts, "batch_size": config.batch_size}
    found = {}
    for name, benchmark in benchmarks.items():
        chosen, extra = protocol, {}
        if name in tuned:
            chosen, extra = swept(segmenter, tuned[name], protocol.for_benchmark(name), **parts)
        count = functools.partial(progress, name) if progress else None
        if count:
            count(0, len(benchmark))  # the rate is counted from here
        result = evaluate(segmenter, benchmark, chosen, progress=count, **parts)
        found[name] = {**result, **extra, **provenance}
        if parts["part"][0] == 0:
            write_result(results / f"{name}.json", found[name])
            if pictures:
                best = found[name]["image_miou"], pictures, config.batch_size
                images = chosen_images(segmenter, benchmark, _for(benchmark, chosen), *best)
                groups = found[name]["group_usage"]["groups"]
                write_sheet(images, benchmark, results / f"{name}.png", groups)
                write_report(results / f"{name}.html", found[name], benchmark, images, groups)
    return found


def _for(benchmark: Benchmark, protocol: Protocol) -> Protocol:
    """The protocol as an evaluation of the benchmark uses it."""
    own = protocol.for_benchmark(benchmark.name)
    return own if benchmark.has_background else own.replace(threshold=None)


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
      protocol: its fields for this benchmark hold here too, as in `evaluate`.
      count: how many images, from the first on.

    Returns:
      The path of the sheet, ``DIRECTORY/NAME.png``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    protocol = with_scale(_for(benchmark, protocol), segmenter)
    count = min(count, len(benchmark))
    images = [benchmark[index] for index in range(count)]
    vocabulary, _ = words_of(benchmark, protocol)
    text = segmenter.text(list(vocabulary.words), protocol.templates)
    scored = image_scores(
        without_index(segmenter.encode),
        text,
        (image for image, _ in images),
        protocol,
        count,
        vocabulary.things,
    )
    panels: dict[int, Image.Image] = {}
    for scores, labels in label_maps(scored, protocol, vocabulary.owners, group=count):
        image, truth = images[scores.index]
        panels[scores.index] = scene_panel(
            image,
            scores.group_map() % group_count,
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
    """`config.tune_count` images to calibrate on, none of which is reported.

    None where the config does not ask to calibrate, or the benchmark has no such images.

    Raises:
      UserError: files are missing, or the images would be reported.
    """
    if not config.calibrate:
        return None
    if name != "scenes" and (name not in FOLDERS or not class_table(FOLDERS[name].base).background):
        return None
    if config.tune_count < 1:
        raise UserError(f"config.eval.tune_count is {config.tune_count}; it must be at least 1")
    return train_split(name, config, config.tune_count)


def _refuse_tune(reported: Benchmark) -> None:
    if getattr(reported, "split", "") == "tune":
        raise UserError(
            f"benchmark {reported.name}: its tune split is to be reported, so no scale or "
            f"threshold can be chosen on it: set config.eval.{reported.name}.split to another one"
        )


def train_split(name: str, config: ConfigDict, count: int) -> Benchmark:
    """`count` images to choose a threshold on, none of which is reported.

    Raises:
      UserError: the benchmark has no such images.
    """
    reported = benchmark_of(name, config)
    if name == "scenes":
        _refuse_tune(reported)
        return benchmark_of(name, config, split="tune", count=count)
    if name not in FOLDERS:
        raise UserError(
            f"benchmark {name} has no training split to choose a threshold on; set "
            "--config.eval.protocol.threshold, or leave out --sweep"
        )
    tune = benchmark_of(name, config, split="train", count=0)
    if shared := set(tune.keys) & set(reported.keys):
        raise UserError(
            f"benchmark {name}: {len(shared)} images are in the lists of both its training and its "
            f"validation split, {min(shared)} among them: no threshold can be chosen on images "
            "that are reported"
        )
    # Evenly over the split, whose order follows years or scenes.
    step = max(1, len(tune) // count)
    return Every(tune, step, min(count, len(tune)))
