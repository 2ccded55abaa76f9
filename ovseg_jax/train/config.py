"""The whole config of a run: a config file names what differs from the defaults given here.

The defaults of ``config.model`` are those of the modules (`models.build.complete_model`), those of
``config.data.transform`` are `data.augment.DEFAULTS`, and those of ``config.eval.protocol`` are the
fields of the protocol of its name, or `Protocol`'s where there is none of this name.
"""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ovseg_jax.data import augment
from ovseg_jax.errors import UserError
from ovseg_jax.flags import apply_override, filled, read_config
from ovseg_jax.models.build import complete_model
from ovseg_jax.segmentation.benchmarks import FOLDER_FIELDS, ScenesBenchmark
from ovseg_jax.segmentation.protocol import NAMES, Protocol, named_protocol

_ABSENT = object()
# Everything but ``config.model``.
DEFAULTS: dict[str, Any] = {
    "seed": 0,  # of the parameters, the order of the data and all randomness
    "data": {
        "source": "records",  # key of `data.sources.SOURCES`
        "records": {"dir": ""},  # what `ovseg_jax.prepare` wrote
        "scenes": {"split": "train", "count": 12000, "seed": 0, "size": 140},
        # Data sets by weight: ({"weight": 2, "records": {"dir": "data/a"}}, ...).
        "mixture": (),
        "tokenizer": "",  # see `data.tokenizer.find_tokenizer`
        "text_length": 0,  # tokens; 0 follows a sample of the captions
        # Prompts that name a caption's entities, and captions for names of classes; "clip" means
        # all of CLIP's, () ours.
        "templates": ("clip",),
        "name_templates": ("clip",),
        "nouns": 0,  # how many nouns of a caption become sentences of their own
        "transform": {"kind": "none", "size": 224, **augment.DEFAULTS},
        # Features of a frozen trunk, of so many random views, and of a frozen text encoder, of
        # captions and the first so many templates.
        "cache_images": False,
        "cached_views": 1,
        "cache_texts": False,
        "cached_templates": 3,
        "cache_dir": ".cache/features",
        "workers": 0,  # see `data.examples.Loader`
        "threads": 1,
    },
    # The terms of Eq. 13; a phase has the weight of the mask term.
    "loss": {
        "entity_weight": 1.0,  # of masked entity completion (Eq. 9)
        "masking": "all_entities",  # see `data.captions.Masking`
        "mask_equal_captions": False,  # equal captions are no negatives of each other
        "negatives_within_set": False,  # negatives come from the example's own data set
        "noun_weight": 0.0,  # of the contrast with sentences of sampled nouns (GroupViT)
        "cross_image": "masks",  # Eq. 12; or "groups", Table 6
        "group_ratio": 0.5,  # r, the share of the groups that are matched
        "mask_threshold": 0.65,  # makes the teacher's masks binary
        "mask_maps": "final_tokens",  # the paper's; or "binding", the released code's
        "mask_directions": "both",  # which images of a pair are students: "both", or "one"
        "mask_divisor": 0.0,  # divides the sum over pairs; 0 for their mean
        "mask_size": 224,  # this and the next two: see `losses.released_mask_consistency`
        "mask_cost": "cosine",
        "detached_ratio": 0.5,
        "teacher_noise": False,  # the teacher drops paths as the online model does
        "frozen_text_dropout": False,  # a frozen text encoder keeps its dropout
        "matching": "host",  # of `losses.matching.BACKENDS`
    },
    # See `optim.optimizer`.
    "optimizer": {
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "clip_norm": 5.0,
        "weight_decay": 0.05,
        "decay_rules": ((".*", 1.0),),
        "rate_rules": ((".*", 1.0),),
        "ema_decay": 0.99,
        "learning_rate": {
            "peak": 3.2e-4,
            "warmup": 0.05,
            "end": 8e-5,
            "start": None,
            "cosine_from": "warmup_end",
            "delay": 0,
        },
    },
    "phases": (),  # see `train.phases.make_phases`
    "accumulation": {"micro_batches": 1},  # parts of a batch, with the same gradient
    "mesh": {"data": -1, "fsdp": 1, "tensor": 1},  # see `sharding.make_mesh`
    "eval": {
        "benchmarks": (),  # at the end of a run; the first one is calibrated on
        "scenes": dataclasses.asdict(ScenesBenchmark()),
        **FOLDER_FIELDS,
        "protocol": dataclasses.asdict(Protocol()),
        # Choose scale and threshold on so many images that are not reported.
        "calibrate": False,
        "tune_count": 300,
        "every": 0,  # steps between evaluations on these images; 0 for none before the end
        "weights": "online",  # or "teacher", for its visual encoder
        "batch_size": 8,
        "pictures": 0,  # to draw at the end
        "untrained": False,  # evaluate the model at its start too
    },
    "log_every": 50,  # steps
    "checkpoint_every": 1000,
    "max_skipped": 20,  # steps without a finite gradient, one after the other
    "hang_seconds": 900.0,  # a step that takes longer is a hang; 0 for no limit
}


def load_config(spec: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> ConfigDict:
    """The complete config of a file (`flags.read_config`), with overrides (`flags.apply_override`).

    Raises:
      UserError: the file cannot be read, or it or an override names a field that does not exist.
    """
    given = read_config(spec)
    try:
        config = complete(given)
    except UserError as error:
        raise UserError(f"config {str(spec)!r}: {error}") from None
    for key, text in overrides:
        apply_override(config, key, text)
    return config


def complete(config: Mapping[str, Any] | ConfigDict, saved: bool = False) -> ConfigDict:
    """A config with the default for every field that it leaves out.

    Args:
      saved: by a run: fields that do not exist are dropped, as an earlier version may have had
        them, and refused otherwise.
    """
    given, defaults = {key: config[key] for key in config}, DEFAULTS
    model, evaluation = given.pop("model", {}), given.get("eval") or {}
    protocol = isinstance(evaluation, Mapping | ConfigDict) and evaluation.get("protocol") or {}
    for name, group in (("model", model), ("eval", evaluation), ("eval.protocol", protocol)):
        if not isinstance(group, Mapping | ConfigDict):
            raise UserError(f"config.{name} is {group!r}, but has fields of its own")
    if protocol.get("name") in NAMES:
        named = dataclasses.asdict(named_protocol(protocol["name"]))
        defaults = {**DEFAULTS, "eval": {**DEFAULTS["eval"], "protocol": named}}
    return ConfigDict({**filled(given, defaults, "config", saved), "model": complete_model(model)})


def plain(config: ConfigDict) -> dict[str, Any]:
    """A config as JSON holds it: dicts, lists, strings, numbers."""
    return json.loads(config.to_json_best_effort(sort_keys=True))


def changed_fields(before: Any, now: Any, path: str = "config") -> list[str]:
    """One line for each field of two plain values that differs: ``config.a.b: 1 -> 2``, sorted."""
    if before == now:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted({*before, *now})
        fields = [(f".{key}", before.get(key, _ABSENT), now.get(key, _ABSENT)) for key in keys]
    elif all(isinstance(x, list) and any(isinstance(i, dict) for i in x) for x in (before, now)):
        pairs = itertools.zip_longest(before, now, fillvalue=_ABSENT)
        fields = [(f"[{index}]", *pair) for index, pair in enumerate(pairs)]
    else:
        first, second = ("absent" if x is _ABSENT else json.dumps(x) for x in (before, now))
        return [f"{path}: {first} -> {second}"]
    return [line for name, *pair in fields for line in changed_fields(*pair, f"{path}{name}")]
