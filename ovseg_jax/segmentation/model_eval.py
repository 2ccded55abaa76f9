"""A model directory on benchmarks: what ``main --mode=eval --model=DIR`` does."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from ovseg_jax import flags, sharding
from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.benchmarks import (
    BENCHMARKS,
    FOLDER_FIELDS,
    ScenesBenchmark,
    check_name,
)
from ovseg_jax.segmentation.protocol import Protocol, saved_protocol
from ovseg_jax.segmentation.published import named_protocol
from ovseg_jax.segmentation.report import run_benchmarks
from ovseg_jax.segmentation.scores import default_batch
from ovseg_jax.segmentation.segmenter import ModelSegmenter
from ovseg_jax.segmentation.whole_images import (
    WHOLE_IMAGES,
    model_facts,
    whole_image_results,
    whole_image_sets,
)
from ovseg_jax.weights.model_dir import load_model


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
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """The results of benchmarks by name, also written to ``RESULTS/NAME.json``.

    Args:
      model: model directory.
      names: of benchmarks, those of `whole_images` among them (every process works on all of
        those).
      data_dir: folder with the official folders (or one of them) of those that have no `dir`.
      protocol_name: a named protocol, in place of the model's own.
      overrides: (key, text) pairs as `flags.parse` gives them. Keys are eval.protocol.FIELD,
        eval.batch_size, and eval.NAME.FIELD of the benchmarks asked for.
      sweep, pictures, progress: see `report.run_benchmarks`.

    Raises:
      UserError: an override that does not apply, an unknown name, or missing files, before
        anything is computed.
    """
    if not names:
        raise UserError("no benchmark named: --benchmark=NAME[,NAME...]")
    masked = tuple(name for name in names if name not in WHOLE_IMAGES)
    for name in masked:
        check_name(name, WHOLE_IMAGES)
    unmasked = whole_image_sets(names, data_dir)
    if not masked:
        _refuse_settings(overrides, protocol_name, sweep, pictures)
        return whole_image_results(model, unmasked, results)
    names = masked
    saved = load_model(model)
    protocol = named_protocol(protocol_name) if protocol_name else None
    protocol = protocol or saved_protocol(saved.info)
    fields = {
        **FOLDER_FIELDS,
        "scenes": dataclasses.asdict(ScenesBenchmark()),
        **saved.info["benchmarks"],
    }
    own = {name: dict(fields[name]) for name in dict.fromkeys(names) if name in BENCHMARKS}
    settings = protocol.as_dict()
    config = ConfigDict({"eval": {"batch_size": 0, "protocol": settings, **own}})
    for key, text in overrides:
        _check_applies(key, own)
        _check_not_hidden(key, protocol, own)
        flags.apply_override(config, key, text)
    for name in own:
        if name in FOLDER_FIELDS and not config.eval[name].dir:
            config.eval[name].dir = data_dir
    if config.eval.batch_size < 0:
        raise UserError("config.eval.batch_size must be at least 1, or 0 to choose one")
    protocol = Protocol.from_config(config.eval.protocol.to_dict())
    mesh = sharding.make_mesh(devices=jax.local_devices())
    shards = sharding.batch_shards(mesh)
    batch = config.eval.batch_size or default_batch(protocol.window)
    config.eval.batch_size = -(-batch // shards) * shards
    segmenter = ModelSegmenter.of_saved(saved, protocol, mesh)
    provenance = model_facts(model, saved.info)
    found = run_benchmarks(
        segmenter,
        names,
        config.eval,
        protocol,
        results,
        provenance,
        sweep=sweep,
        pictures=pictures,
        progress=progress,
    )
    return {**found, **whole_image_results(model, unmasked, results)}


def _refuse_settings(
    overrides: Sequence[tuple[str, str]], protocol: str, sweep: int, pictures: int
) -> None:
    if overrides or protocol or sweep or pictures:
        raise UserError(
            "--config.*, --protocol, --sweep and --pictures are about label maps, and "
            f"{' and '.join(WHOLE_IMAGES)} have none"
        )


def _check_applies(key: str, own: dict[str, Any]) -> None:
    """Raises UserError for a key that nothing here would read."""
    part = key.removeprefix("eval.").split(".")[0]
    if key.startswith("eval.") and part in ("protocol", "batch_size", *own):
        return
    known = ("eval.protocol.FIELD", "eval.batch_size", *(f"eval.{name}.FIELD" for name in own))
    if part in BENCHMARKS:
        raise UserError(
            f"--config.{key} does not apply: benchmark {part} is not evaluated; add it to "
            "--benchmark"
        )
    raise UserError(
        f"--config.{key} does not apply to a model directory, whose model is what it is; there "
        f"are: {', '.join(known)}"
    )


def _check_not_hidden(key: str, protocol: Protocol, own: dict[str, Any]) -> None:
    """Raises UserError for a setting of which a benchmark has a value of its own."""
    field = key.removeprefix("eval.protocol.")
    for name in own:
        if field == "threshold" and name in protocol.thresholds:
            instead = f"thresholds.{name}"
        elif field in protocol.per_benchmark.get(name, {}):
            instead = f"per_benchmark.{name}.{field}"
        else:
            continue
        raise UserError(
            f"--config.{key} does not apply to benchmark {name}, which has a value of its own: set "
            f"--config.eval.protocol.{instead}"
        )
