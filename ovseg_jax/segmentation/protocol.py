"""Everything that defines how label maps are made, stored with every result and every model.

Named protocols are the files of ``protocols/``: each has a title, the source of its settings, how
it differs from that source, and the settings, which are fields of `Protocol`.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from importlib import resources
from typing import Any

from ml_collections import ConfigDict

from ovseg_jax.data.tokenizer import expand_templates
from ovseg_jax.errors import UserError
from ovseg_jax.flags import OPTIONAL, nearest

NAMES = ("paper", "released", "groupvit", "tcl", "sclip")
CHOICES = {
    "affinity": ("binding", "features"),
    "order": ("upsample_first", "argmax_first"),
    "grouping": ("soft_patches", "one_group"),
    "average": ("unit", "raw"),
    "resize": ("antialiased", "four_pixels"),
    "grid": ("exact", "rounded_patch"),
    "averaged": ("probabilities", "cosines"),
    "class_names": ("released", "official", "sclip", "everyday"),
}
# Words that compete where a person lists classes and the protocol does not say how many.
FEWEST_WORDS = 20
_PIXELS = ("short_side", "long_limit", "window", "stride")
_COUNTS = ("image_scale", "border_scale", "image_classes", "competing_words", "pamr_steps")
_FLOATS = ("scale", "image_scale", "border_scale", "threshold", "min_area")
# Every other field may have another value for some benchmarks.
_NOT_PER_BENCHMARK = {"name", "thresholds", "per_benchmark"}
# Fields that earlier versions wrote, and the only values that are still understood.
_RETIRED = {
    "assignment": "soft",
    "assignment_temperature": 1.0,
    "flip": False,
    "scales": [1.0],
    "pamr_dilations": [1, 2, 4, 8, 12, 24],
}


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Two results can be compared only where their protocols are equal."""

    name: str = "paper"  # what tables call it
    # Pixels: the image is resized to this short side, unless its long side would exceed the limit.
    short_side: int = 448
    long_limit: int = 2048
    # Pixels: side and spacing of the square windows.
    window: int = 448
    stride: int = 224
    # Factor on the cosines before the softmax over classes; None for the inverse temperature that
    # the model learned.
    scale: float | None = 10.0
    # Lowers classes that the whole image speaks against (`readout.downweight_by_image_score`), and
    # words for things where a pixel resembles the image's border (`readout.foreground_log`).
    image_scale: float = 0.0
    border_scale: float = 0.0
    # A pixel whose best probability is lower is background; None for no background.
    threshold: float | None = None
    order: str = "upsample_first"  # or "argmax_first", the order of Eq. 1
    # Prompts whose embeddings are averaged for each class; "clip" in a config: all of CLIP's.
    templates: tuple[str, ...] = ("a photo of a {}.",)
    # The patch-to-group map: of the binding (Eq. 4), or the product of patch and group "features",
    # the paper's sentence about Eq. 1, which no loss trains before the mask phase (on scenes 11 to
    # 12 mIoU, where the binding reached 33 to 38).
    affinity: str = "binding"
    # A patch's score is the mean of its groups' cosines, or ("one_group") each pixel belongs to one
    # group and has its scores.
    grouping: str = "soft_patches"
    image_classes: int = 0  # with "one_group", see `readout.group_probabilities`
    # Whether a threshold above every probability of the image (with "one_group", of the window) is
    # lowered to the highest, so that something is always labeled.
    cap_threshold: bool = False
    average: str = "unit"  # what is averaged over the templates: unit embeddings or "raw" ones
    resize: str = "antialiased"  # see `readout.resize_image`
    grid: str = "exact"  # see `readout.grid_shape`
    # Thresholds of benchmarks by their names, in place of `threshold`.
    thresholds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    # How many words competed for a pixel when the threshold was chosen (`vocabulary.competition`,
    # `threshold_for`). With 0 only the classes' words compete, as in published protocols.
    competing_words: int = 0
    # What is averaged over windows and interpolated to pixels; with "cosines" the softmax over
    # classes is taken at each pixel.
    averaged: str = "probabilities"
    class_names: str = "released"  # whose words stand for classes, see `benchmarks.class_words`
    # Classes that win less than this share of the foreground lose it to the best other words.
    min_area: float = 0.0
    pamr_steps: int = 0  # rounds of refinement by the image's colors, see `labels.pamr`
    # Fields that differ for some benchmarks, by the benchmarks' names.
    per_benchmark: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        soft, upsample = self.grouping == "soft_patches", self.order == "upsample_first"
        probabilities = self.averaged == "probabilities"
        evidence = self.image_scale > 0 or self.border_scale > 0
        changed = self.pamr_steps > 0 or not probabilities or self.min_area > 0
        named = all("{}" in text for text in self.templates)
        value = functools.partial(getattr, self)
        rules = {
            **{f"{x} must be {' or '.join(CHOICES[x])}": value(x) in CHOICES[x] for x in CHOICES},
            **{f"{x} must be at least 1 pixel": value(x) >= 1 for x in _PIXELS},
            **{f"{x} must be at least 0": value(x) >= 0 for x in _COUNTS},
            "scale must be above 0, or none": self.scale is None or self.scale > 0,
            "templates need at least one text, each with {}": bool(self.templates) and named,
            "min_area must be at least 0 and below 1": 0 <= self.min_area < 1,
            "grouping='one_group' needs order='upsample_first'": soft or upsample,
            "image_classes needs grouping='one_group'": not (soft and self.image_classes),
            "image_scale and border_scale need grouping='soft_patches' and "
            "averaged='probabilities'": not evidence or (soft and probabilities),
            "pamr_steps, averaged='cosines' and min_area need grouping='soft_patches' and "
            "order='upsample_first'": not changed or (soft and upsample),
        }
        for rule, holds in rules.items():
            if not holds:
                raise UserError(f"protocol: {rule}")
        for name, fields in self.per_benchmark.items():
            where = f"protocol: per_benchmark.{name}"
            self.replace(**_plain(fields, where, _NOT_PER_BENCHMARK), per_benchmark={})

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | ConfigDict) -> "Protocol":
        """From a mapping with any of the fields, such as a ConfigDict or what `as_dict` gave;
        UserError for a field that does not exist, or a value that makes no sense."""
        given = {key: config[key] for key in config}
        for key, value in _RETIRED.items():
            # As JSON, where a tuple is a list.
            if json.dumps(given.get(key), default=repr) == json.dumps(value):
                del given[key]
        protocol = cls(**_plain(given, "protocol"))
        for threshold in (protocol.threshold, *protocol.thresholds.values()):
            if threshold is not None and not 0 <= threshold <= 1:
                raise UserError(f"protocol: threshold {threshold} must be from 0 to 1")
        return protocol

    def replace(self, **changes: Any) -> "Protocol":
        """A copy with some fields changed, for example a calibrated scale and threshold."""
        return dataclasses.replace(self, **changes)

    def threshold_for(self, words: int) -> float | None:
        """The threshold where `words` words compete.

        With more words than N = `competing_words` the best word's probability e / (e + S) falls (S
        sums over the others), though the image is the same. To compare e / (e + r S) with the
        threshold t, r = (N - 1) / (words - 1), as if N - 1 average words competed with the best, is
        to compare e / (e + S) with t r / (1 - t + t r).
        """
        if self.threshold is None or not 1 < self.competing_words < words:
            return self.threshold
        ratio = (self.competing_words - 1) / (words - 1)
        return self.threshold * ratio / (1 - self.threshold + self.threshold * ratio)

    def for_list_of_classes(self) -> "Protocol":
        """The protocol for classes that a person lists: by default `FEWEST_WORDS` compete."""
        return self.replace(competing_words=self.competing_words or FEWEST_WORDS)

    def for_benchmark(self, name: str) -> "Protocol":
        """The protocol with what `thresholds` and `per_benchmark` have for this benchmark."""
        base = self.for_list_of_classes() if name == "folder" else self
        threshold = {"threshold": self.thresholds.get(name, self.threshold)}
        changes = threshold | dict(self.per_benchmark.get(name, {}))
        return base.replace(**changes, thresholds={}, per_benchmark={})

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `from_config` reads them back."""
        per_benchmark = {name: dict(fields) for name, fields in self.per_benchmark.items()}
        plain = {"thresholds": dict(self.thresholds), "per_benchmark": per_benchmark}
        return dataclasses.asdict(self) | plain | {"templates": list(self.templates)}


_FIELDS = {field.name for field in dataclasses.fields(Protocol)}
_TYPES = {
    field.name: type(field.default)
    for field in dataclasses.fields(Protocol)
    if isinstance(field.default, bool | int | str)
}


def _plain(config: Any, where: str, excluded: Collection[str] = ()) -> dict[str, Any]:
    """Some fields, with lists and ints of JSON and config files as the fields' own types."""
    if not isinstance(config, Mapping | ConfigDict):
        raise UserError(f"{where} cannot be {config!r}")
    values, known = {key: config[key] for key in config}, _FIELDS - set(excluded)
    if unknown := sorted(set(values) - known):
        raise UserError(f"{where}: unknown {', '.join(unknown)}; there are: {sorted(known)}")
    for key, value in values.items():
        if key in _TYPES and type(value) is not _TYPES[key]:
            raise UserError(f"{where}: {key} is of type {_TYPES[key].__name__}, not {value!r}")
        if key in _READERS and not (value is None and key in OPTIONAL):
            try:
                values[key] = _READERS[key](value)
            except (TypeError, ValueError, OverflowError):
                raise UserError(f"{where}: {key} cannot be {value!r}") from None
    return values


def _templates(texts: Any) -> tuple[str, ...]:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise TypeError("templates are a list of texts")
    return expand_templates(texts) if len(texts) else ()


def _number(value: Any) -> float:
    if isinstance(value, bool | str) or not math.isfinite(value):
        raise ValueError("no finite number")
    return float(value)


def _thresholds(values: Any) -> dict[str, float]:
    return {name: _number(values[name]) for name in dict(values)}


def _per_benchmark(given: Mapping | ConfigDict) -> dict[str, dict[str, Any]]:
    where = "protocol: per_benchmark."
    return {name: _plain(given[name], where + name, _NOT_PER_BENCHMARK) for name in given}


_READERS = dict.fromkeys(_FLOATS, _number) | {
    "templates": _templates,
    "thresholds": _thresholds,
    "per_benchmark": _per_benchmark,
}


def saved_protocol(info: Mapping[str, Any]) -> Protocol:
    """The protocol in a model directory's config.json."""
    # Directories older than the field `competing_words` have that number in their provenance.
    words = info["provenance"].get("calibrated_words", 0)
    return Protocol.from_config({"competing_words": words, **info["protocol"]})


def digest(content: bytes) -> str:
    """The first digits of the SHA-256."""
    return hashlib.sha256(content).hexdigest()[:12]


def names_hash(class_names: Sequence[str]) -> str:
    """Short hash of the class words in their order: other words are another protocol."""
    return digest("\n".join(class_names).encode())


# ---- named protocols


@functools.cache
def data_file(file: str, package: str = "ovseg_jax.segmentation") -> dict[str, Any]:
    """The content of a JSON file of the package; not to be changed."""
    return json.loads((resources.files(package) / file).read_text(encoding="utf-8"))


def named_protocol(name: str) -> Protocol:
    """The protocol called `name`; UserError if there is none."""
    if name not in NAMES:
        hint = f"there are {', '.join(NAMES)}{nearest(name, NAMES)}"
        raise UserError(f"unknown protocol {name!r}; {hint}")
    return Protocol.from_config({**data_file(f"protocols/{name}.json")["settings"], "name": name})


def protocol_notes(name: str) -> dict[str, str]:
    """Title, source and difference of a named protocol, for reports; {} for one of another name."""
    notes = data_file(f"protocols/{name}.json") if name in NAMES else {}
    return {key: text for key, text in notes.items() if key != "settings"}


def is_named(protocol: Protocol, benchmark: str, own_scale: bool = False) -> bool:
    """Whether results under `protocol` (for the benchmark) may stand beside published ones of the
    protocol it names; with `own_scale` its scale is the model's."""
    if protocol.name not in NAMES:
        return False
    named = named_protocol(protocol.name).for_benchmark(benchmark)
    # Benchmarks without background have no threshold.
    same = {} if protocol.threshold is not None else {"threshold": None}
    if own_scale and named.scale is None:
        same["scale"] = protocol.scale
    return named.replace(**same) == protocol
