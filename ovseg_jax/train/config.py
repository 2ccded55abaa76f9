"""The whole config of a run: a config file names what differs from the defaults given here.

The defaults of ``config.model`` are those of the modules (`models.build.complete_model`), those of
``config.data.transform`` are `data.augment.DEFAULTS`, and those of ``config.eval.protocol`` are the
fields of the protocol of its name, or `Protocol`'s where there is none of this name.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ovseg_jax.data import augment
from ovseg_jax.errors import UserError
from ovseg_jax.flags import apply_override, nearest, read_config
from ovseg_jax.models.build import complete_model
from ovseg_jax.segmentation.benchmarks import FOLDER_FIELDS, ScenesBenchmark
from ovseg_jax.segmentation.protocol import NAMES, Protocol, named_protocol


@dataclass(frozen=True)
class Scenes:
    """``config.data.scenes``: the embedded data set; `size` is in pixels."""

    split: str = "train"
    count: int = 12000
    seed: int = 0
    size: int = 140


@dataclass(frozen=True)
class Records:
    """``config.data.records``: a folder that `ovseg_jax.prepare` wrote."""

    dir: str = ""


@dataclass(frozen=True)
class Data:
    """``config.data``: the training examples.

    Attributes:
      source: key of `data.sources.SOURCES`.
      mixture: with the source "mixture", the data sets and their weights:
        ({"weight": 2, "records": {"dir": "data/a"}}, ...).
      tokenizer: see `data.tokenizer.find_tokenizer`.
      text_length: tokens that texts are padded or cut to; 0 follows a sample of the captions.
      templates: prompts that name a caption's entities; "clip" means all of CLIP's, () our own.
      name_templates: captions of images in class-named folders, likewise.
      nouns: how many nouns of a caption become sentences of their own; 0 for none.
      transform: see `data.augment.complete_transform`.
      cache_images, cached_views: keep the features of a frozen trunk, of so many random views.
      cache_texts, cached_templates: keep the outputs of a frozen text encoder; prompts use the
        first so many templates.
      cache_dir: folder of both caches.
      workers, threads: see `data.loader.make_loader`.
    """

    source: str = "records"
    records: Records = Records()
    scenes: Scenes = Scenes()
    mixture: tuple[Mapping[str, Any], ...] = ()
    tokenizer: str = ""
    text_length: int = 0
    templates: tuple[str, ...] = ("clip",)
    name_templates: tuple[str, ...] = ("clip",)
    nouns: int = 0
    transform: Mapping[str, Any] = field(
        default_factory=lambda: {"kind": "none", "size": 224, **augment.DEFAULTS}
    )
    cache_images: bool = False
    cached_views: int = 1
    cache_texts: bool = False
    cached_templates: int = 3
    cache_dir: str = ".cache/features"
    workers: int = 0
    threads: int = 1


@dataclass(frozen=True)
class Loss:
    """``config.loss``: the terms of Eq. 13; a phase sets the weight of the mask term.

    Attributes:
      entity_weight: of masked entity completion (Eq. 9); 0 leaves it out.
      masking: the completion's objective, see `data.captions.Masking`.
      mask_equal_captions: equal captions are no negatives of each other.
      negatives_within_set: negatives come from the example's own data set.
      noun_weight: of the contrast with sentences of sampled nouns (GroupViT).
      cross_image: "masks" (Eq. 12), or "groups" (the paper's Table 6).
      group_ratio: r, the share of the groups that are matched.
      mask_threshold: at which a teacher's mask becomes binary.
      mask_maps: "final_tokens" (the paper), or "binding" (the released code).
      mask_directions: "both" images of a pair are students, or "one".
      mask_divisor: the sum over pairs is divided by it; 0 takes their mean.
      mask_size, mask_cost, detached_ratio: see `losses.released_mask_consistency`.
      teacher_noise: the teacher drops paths as the online model does.
      frozen_text_dropout: a frozen text encoder keeps its dropout.
      matching: how the Hungarian problem is solved, one of `losses.matching.BACKENDS`.
    """

    entity_weight: float = 1.0
    masking: str = "all_entities"
    mask_equal_captions: bool = False
    negatives_within_set: bool = False
    noun_weight: float = 0.0
    cross_image: str = "masks"
    group_ratio: float = 0.5
    mask_threshold: float = 0.65
    mask_maps: str = "final_tokens"
    mask_directions: str = "both"
    mask_divisor: float = 0.0
    mask_size: int = 224
    mask_cost: str = "cosine"
    detached_ratio: float = 0.5
    teacher_noise: bool = False
    frozen_text_dropout: bool = False
    matching: str = "host"


@dataclass(frozen=True)
class LearningRate:
    """``config.optimizer.learning_rate``, see `optim.optimizer.learning_rate`."""

    peak: float = 3.2e-4
    warmup: float = 0.05
    end: float = 8e-5
    start: float | None = None
    cosine_from: str = "warmup_end"
    delay: int = 0


@dataclass(frozen=True)
class Optimizer:
    """``config.optimizer``, see `optim.optimizer.make_optimizer`."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float = 5.0
    weight_decay: float = 0.05
    decay_rules: tuple[tuple[str, float], ...] = ((".*", 1.0),)
    rate_rules: tuple[tuple[str, float], ...] = ((".*", 1.0),)
    ema_decay: float = 0.99
    learning_rate: LearningRate = LearningRate()


@dataclass(frozen=True)
class Accumulation:
    """``config.accumulation``: parts that a batch is computed in, with the same gradient."""

    micro_batches: int = 1


@dataclass(frozen=True)
class MeshSizes:
    """``config.mesh``, see `sharding.make_mesh`."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class Evaluation:
    """``config.eval``; ``config.eval.NAME`` has the fields of the benchmark NAME besides.

    Attributes:
      benchmarks: names of those to evaluate on at the end; the first one is calibrated on.
      calibrate, tune_count: choose scale and threshold on so many images that are not reported.
      every: steps between evaluations on these images; 0 for none before the end.
      weights: "online", or "teacher" for its visual encoder.
      batch_size: images in a batch.
      pictures: images to draw at the end.
      untrained: evaluate the model at its start too.
    """

    benchmarks: tuple[str, ...] = ()
    protocol: Protocol = Protocol()
    calibrate: bool = False
    tune_count: int = 300
    every: int = 0
    weights: str = "online"
    batch_size: int = 8
    pictures: int = 0
    untrained: bool = False


@dataclass(frozen=True)
class Config:
    """A whole config but for ``config.model``.

    Attributes:
      seed: of the parameters, the order of the data and all randomness.
      phases: see `train.phases.make_phases`.
      log_every, checkpoint_every: steps.
      max_skipped: steps without a finite gradient, one after the other, before a run gives up.
      hang_seconds: a step that takes longer counts as a hang; 0 for no limit.
    """

    seed: int = 0
    data: Data = Data()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    phases: tuple[Mapping[str, Any], ...] = ()
    accumulation: Accumulation = Accumulation()
    mesh: MeshSizes = MeshSizes()
    eval: Evaluation = Evaluation()
    log_every: int = 50
    checkpoint_every: int = 1000
    max_skipped: int = 20
    hang_seconds: float = 900.0


def load_config(spec: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> ConfigDict:
    """The complete config that a config file describes, with fields set from the command line.

    Args:
      spec: see `flags.read_config`.
      overrides: (key, text) pairs for `flags.apply_override`.

    Raises:
      UserError: the file cannot be read, or names a field that does not exist; or an override does.
    """
    try:
        config = complete(read_config(spec))
    except UserError as error:
        raise UserError(f"config {str(spec)!r}: {error}") from None
    for key, text in overrides:
        apply_override(config, key, text)
    return config


def complete(config: Mapping[str, Any] | ConfigDict, saved: bool = False) -> ConfigDict:
    """A config with the default for every field that it leaves out.

    Args:
      config: what a config file gives, or what a run saved.
      saved: drop fields that do not exist, as an earlier version may have had them.

    Raises:
      UserError: a field that does not exist.
    """
    defaults = dataclasses.asdict(Config())
    defaults["eval"] |= {"scenes": dataclasses.asdict(ScenesBenchmark()), **FOLDER_FIELDS}
    given = {key: config[key] for key in config}
    protocol = (given.get("eval") or {}).get("protocol") or {}
    if protocol.get("name") in NAMES:
        defaults["eval"]["protocol"] = dataclasses.asdict(named_protocol(protocol["name"]))
    model = complete_model(given.pop("model", {}))
    return ConfigDict({**_filled(given, defaults, "config", saved), "model": model})


def _filled(
    given: Mapping[str, Any] | ConfigDict, defaults: Mapping[str, Any], where: str, saved: bool
) -> dict[str, Any]:
    full = dict(defaults)
    for key, value in given.items():
        if key not in defaults:
            if saved:
                continue
            raise UserError(f"{where}.{key} is no field{nearest(key, list(defaults))}")
        if defaults[key] and isinstance(defaults[key], Mapping):
            if not isinstance(value, Mapping | ConfigDict):
                raise UserError(f"{where}.{key} is {value!r}, but has fields of its own")
            value = _filled(value, defaults[key], f"{where}.{key}", saved)
        full[key] = value
    return full
