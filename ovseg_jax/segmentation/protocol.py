"""Everything that defines how label maps are made, stored with every result and every model.

Named protocols are the files of ``protocols/``: each has a title, the source of its settings, how
it differs from that source, and the settings, which are fields of `Protocol`.
``published_results.json`` has the mIoU of published models, each row with its source and the
protocols under which its authors computed it.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from ml_collections import ConfigDict

from ovseg_jax.data.tokenizer import expand_templates
from ovseg_jax.errors import UserError
from ovseg_jax.flags import nearest

NAMES = ("paper", "released", "groupvit", "tcl", "sclip")
CHOICES = {
    "order": ("upsample_first", "argmax_first"),
    "affinity": ("binding", "features"),
    "grouping": ("soft_patches", "one_group"),
    "average": ("unit", "raw"),
    "resize": ("antialiased", "four_pixels"),
    "grid": ("exact", "rounded_patch"),
    "averaged": ("probabilities", "cosines"),
    "class_names": ("released", "official", "sclip", "everyday"),
}
# Words that compete where a person lists classes and the protocol does not say how many.
FEWEST_WORDS = 20
# Every other field may have another value for some benchmarks.
_NOT_PER_BENCHMARK = ("name", "thresholds", "per_benchmark")
# Fields that earlier versions wrote, and the only values that they wrote.
_RETIRED = {
    "assignment": "soft",
    "assignment_temperature": 1.0,
    "flip": False,
    "scales": (1.0,),
    "pamr_dilations": (1, 2, 4, 8, 12, 24),
}


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Two results can be compared only where their protocols are equal.

    Attributes:
      name: what tables call it.
      short_side, long_limit: the image is resized to this short side, unless its long side would
        exceed the limit (pixels).
      window, stride: side and spacing of the square windows (pixels).
      scale: factor on the cosines before the softmax over classes; None for the inverse
        temperature that the model learned.
      image_scale: probabilities of a class are multiplied by exp(image_scale * difference), where
        the difference is its cosine with the whole image minus that of the image's best class; 0
        for no change.
      border_scale: probabilities of a pixel are multiplied by its probability of showing no
        surroundings, which falls with its likeness to the border of the image (see
        `readout.foreground_log`). Words that name surroundings are exempt (see
        `Vocabulary.things`). 0 for no change.
      threshold: a pixel whose best probability is lower is background; None where there is no
        background.
      thresholds: thresholds of benchmarks by their names, in place of `threshold`.
      competing_words: how many words competed for a pixel when the threshold was chosen. Shorter
        lists of classes get everyday words for the background until as many compete (see
        `vocabulary.competition`). For longer lists the threshold changes, see `threshold_for`. With
        0 only the words of the classes compete, and the threshold is used unchanged, as in
        published protocols.
      order: 'upsample_first' or 'argmax_first' (the order of Eq. 1).
      templates: prompts whose embeddings are averaged for each class, with {} for its name; in a
        config "clip" stands for all of CLIP's.
      affinity: where the patch-to-group map comes from, 'binding' (Eq. 4) or 'features' (Eq. 1).
      grouping: 'soft_patches', where a patch's score is the mean of its groups' cosines, or
        'one_group', where each pixel belongs to one group and has its scores (see `readout`).
      image_classes: with 'one_group', probabilities are multiplied by those among this many
        classes, the most similar to the whole window; 0 for no second softmax.
      cap_threshold: whether a threshold above every probability is lowered to the highest, so that
        something is always labeled: the highest of the image, or with 'one_group' of each window.
      average: what is averaged over the templates, 'unit' embeddings or 'raw' ones.
      resize: 'antialiased' or 'four_pixels', see `windows.resize_image`.
      grid: 'exact' or 'rounded_patch', see `windows.grid_shape`.
      averaged: what is averaged over windows and interpolated to pixels: 'probabilities', or
        'cosines', with the softmax over classes taken at each pixel.
      class_names: whose words stand for the classes of a benchmark, see `benchmarks.class_words`.
      min_area: classes that win less than this share of all foreground pixels are removed, and
        their pixels go to the best of the other words; 0 for none.
      pamr_steps: rounds of refinement by the image's colors, see `labels.pamr`; 0 for none.
      per_benchmark: fields that differ for some benchmarks, by the benchmarks' names.
    """

    name: str = "paper"
    short_side: int = 448
    long_limit: int = 2048
    window: int = 448
    stride: int = 224
    scale: float | None = 10.0
    image_scale: float = 0.0
    border_scale: float = 0.0
    threshold: float | None = None
    order: str = "upsample_first"
    templates: tuple[str, ...] = ("a photo of a {}.",)
    affinity: str = "binding"
    grouping: str = "soft_patches"
    image_classes: int = 0
    cap_threshold: bool = False
    average: str = "unit"
    resize: str = "antialiased"
    grid: str = "exact"
    thresholds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    competing_words: int = 0
    averaged: str = "probabilities"
    class_names: str = "released"
    min_area: float = 0.0
    pamr_steps: int = 0
    per_benchmark: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for field, allowed in CHOICES.items():
            if getattr(self, field) not in allowed:
                raise UserError(
                    f"protocol: {field} is {getattr(self, field)!r}; it must be "
                    + " or ".join(map(repr, allowed))
                )
        for field in ("short_side", "long_limit", "window", "stride"):
            self._require(getattr(self, field) >= 1, f"{field} must be at least 1 pixel")
        counts = ("image_scale", "border_scale", "image_classes", "competing_words", "pamr_steps")
        for field in counts:
            self._require(getattr(self, field) >= 0, f"{field} must be at least 0")
        scale = self.scale
        self._require(scale is None or scale > 0, f"scale {scale} must be above 0, or none")
        self._require(
            bool(self.templates) and all("{}" in text for text in self.templates),
            "templates need at least one text, each with {} for the name",
        )
        self._require(0 <= self.min_area < 1, "min_area must be at least 0 and below 1")
        soft = self.grouping == "soft_patches"
        upsample_first = self.order == "upsample_first"
        self._require(soft or upsample_first, "grouping='one_group' needs order='upsample_first'")
        self._require(not (soft and self.image_classes), "image_classes needs grouping='one_group'")
        evidence = self.image_scale > 0 or self.border_scale > 0
        self._require(
            not evidence or (soft and self.averaged == "probabilities"),
            "image_scale and border_scale need grouping='soft_patches' and "
            "averaged='probabilities'",
        )
        changed = self.pamr_steps > 0 or self.averaged != "probabilities" or self.min_area > 0
        self._require(
            not changed or (soft and upsample_first),
            "pamr_steps, averaged='cosines' and min_area need grouping='soft_patches' and "
            "order='upsample_first'",
        )
        for name, fields in self.per_benchmark.items():
            self.replace(**_per_benchmark(fields, f"per_benchmark.{name}"), per_benchmark={})

    def _require(self, holds: bool, rule: str) -> None:
        if not holds:
            raise UserError(f"protocol: {rule}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | ConfigDict) -> "Protocol":
        """From a mapping with any of the fields, such as a ConfigDict or what `as_dict` gave.

        Fields of earlier versions are passed over where they hold what they always held.

        Raises:
          UserError: a field that does not exist, or a value that makes no sense.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        config = {key: config[key] for key in config if not _is_retired(key, config[key])}
        unknown = sorted(set(config) - known)
        if unknown:
            raise UserError(f"protocol: unknown {', '.join(unknown)}; there are: {sorted(known)}")
        protocol = cls(**_plain(config))
        for threshold in (protocol.threshold, *protocol.thresholds.values()):
            if threshold is not None and not 0 <= threshold <= 1:
                raise UserError(
                    f"protocol: threshold {threshold} is compared with probabilities; it must be "
                    "from 0 to 1"
                )
        return protocol

    def replace(self, **changes: Any) -> "Protocol":
        """A copy with some fields changed, for example a calibrated scale and threshold."""
        return dataclasses.replace(self, **changes)

    def threshold_for(self, words: int) -> float | None:
        """The threshold where `words` words compete.

        With more words than N = `competing_words` the probability of the best word falls, though
        the image is the same. It is e / (e + S), where S sums over the other words. What should be
        compared is e / (e + r S) with r = (N - 1) / (words - 1), as if N - 1 words like the average
        of the others competed; it exceeds t where e / (e + S) exceeds t r / (1 - t + t r).
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
        if name == "folder":
            return self.for_list_of_classes()._for_benchmark(name)
        return self._for_benchmark(name)

    def _for_benchmark(self, name: str) -> "Protocol":
        threshold = self.thresholds.get(name, self.threshold)
        own = self.per_benchmark.get(name, {})
        return self.replace(
            **{"threshold": threshold, **own, "thresholds": {}, "per_benchmark": {}}
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `from_config` reads them back."""
        values = dataclasses.asdict(self)
        lists = {key: list(x) for key, x in values.items() if isinstance(x, tuple)}
        own = {name: dict(fields) for name, fields in self.per_benchmark.items()}
        return {**values, **lists, "thresholds": dict(self.thresholds), "per_benchmark": own}


def _is_retired(key: str, value: Any) -> bool:
    value = tuple(value) if isinstance(value, list) else value
    return key in _RETIRED and value == _RETIRED[key]


def _plain(config: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """Lists and ints of JSON and config files as the fields' own types."""
    values = {key: config[key] for key in config}
    kinds = {
        "scale": float,
        "image_scale": float,
        "border_scale": float,
        "threshold": float,
        "min_area": float,
        "templates": lambda names: expand_templates(names) if len(names) else (),
        "thresholds": dict,
    }
    for key, kind in kinds.items():
        if values.get(key) is not None:
            try:
                values[key] = kind(values[key])
            except (TypeError, ValueError):
                raise UserError(f"protocol: {key} cannot be {values[key]!r}") from None
    if "per_benchmark" in values:
        values["per_benchmark"] = {
            name: _per_benchmark(fields, f"per_benchmark.{name}")
            for name, fields in dict(values["per_benchmark"]).items()
        }
    return values


def _per_benchmark(fields: Mapping[str, Any] | ConfigDict, where: str) -> dict[str, Any]:
    """The fields as plain values.

    Raises:
      UserError: one of them may not differ between benchmarks.
    """
    known = {field.name for field in dataclasses.fields(Protocol)} - set(_NOT_PER_BENCHMARK)
    unknown = sorted(set(fields) - known)
    if unknown:
        raise UserError(f"protocol: {where} has unknown {', '.join(unknown)}")
    return _plain(fields)


def saved_protocol(info: Mapping[str, Any]) -> Protocol:
    """The protocol in a model directory's config.json.

    Directories older than the field `competing_words` have that number in their provenance.

    Raises:
      UserError: see `Protocol.from_config`.
    """
    fields = dict(info["protocol"])
    if "calibrated_words" in info["provenance"]:
        fields.setdefault("competing_words", info["provenance"]["calibrated_words"])
    return Protocol.from_config(fields)


def names_hash(class_names: Sequence[str]) -> str:
    """Short hash of the class words in their order: other words are another protocol."""
    return hashlib.sha256("\n".join(class_names).encode()).hexdigest()[:12]


# ---- named protocols, and what others scored under them


@functools.cache
def _document(file: str) -> dict[str, Any]:
    path = resources.files("ovseg_jax.segmentation") / file
    return json.loads(path.read_text(encoding="utf-8"))


def named_protocol(name: str) -> Protocol:
    """The protocol called `name`.

    Raises:
      UserError: there is none.
    """
    if name not in NAMES:
        raise UserError(
            f"unknown protocol {name!r}{nearest(name, list(NAMES))}; there are: {', '.join(NAMES)}"
        )
    return Protocol.from_config({**_document(f"protocols/{name}.json")["settings"], "name": name})


def protocol_notes(name: str) -> dict[str, str]:
    """Title, source and difference of a named protocol, for reports; {} for one of another name."""
    if name not in NAMES:
        return {}
    document = _document(f"protocols/{name}.json")
    return {key: document[key] for key in ("title", "source", "differs")}


def is_named(protocol: Protocol, benchmark: str, own_scale: bool = False) -> bool:
    """Whether results under `protocol` may stand beside published ones of the protocol it names.

    Args:
      protocol: as it was for the benchmark.
      own_scale: its scale is the model's, where the named one leaves the scale to the model.
    """
    if protocol.name not in NAMES:
        return False
    named = named_protocol(protocol.name).for_benchmark(benchmark)
    skipped = {"name", "scale"} if own_scale and named.scale is None else {"name"}
    # Benchmarks without background have no threshold.
    skipped |= {"threshold"} if protocol.threshold is None else set()
    return all(
        getattr(protocol, field.name) == getattr(named, field.name)
        for field in dataclasses.fields(Protocol)
        if field.name not in skipped
    )


def published_rows(protocol: str, benchmark: str) -> list[Mapping[str, Any]]:
    """Rows of ``published_results.json`` with a score on the benchmark under the protocol."""
    rows = _document("published_results.json")["rows"]
    return [row for row in rows if protocol in row["protocols"] and benchmark in row["miou"]]
