"""Everything that defines how label maps are made, stored with every result and every model."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from ovseg_jax.data.captions import expand_templates
from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.readout import check_order

CHOICES = {
    "affinity": ("binding", "features"),
    "grouping": ("soft_patches", "one_group"),
    "average": ("unit", "raw"),
    "resize": ("antialiased", "four_pixels"),
    "grid": ("exact", "rounded_patch"),
    "averaged": ("probabilities", "cosines"),
    "assignment": ("soft", "hard"),
    "class_names": ("released", "official", "sclip", "everyday"),
}
# Words that compete where a person lists classes and the protocol does not say how many.
FEWEST_WORDS = 20
# Fields that a benchmark may have a value of its own for: all but the name and the tables.
_TABLES = ("name", "thresholds", "per_benchmark")


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Two results compare only where their protocols are equal.

    Attributes:
      name: what to call it in tables.
      short_side, long_limit: the image is resized to this short side, unless its long side would
        exceed the limit (pixels).
      window, stride: side and spacing of the square windows (pixels).
      scale: factor on the cosines before the softmax over classes; None for the inverse
        temperature that the model learned.
      image_scale: classes whose cosine with the whole image is lower than that of the image's best
        class have their probabilities lowered, by exp(image_scale * difference); 0 for not at all.
      border_scale: probabilities are multiplied by that of the pixel showing no surroundings, which
        falls with its likeness to the border of the image (see `readout.foreground_log`), except
        those of words that name surroundings (see `vocabulary.SURROUNDINGS`); 0 for not at all.
      threshold: a pixel whose best probability is lower is background; None where there is no
        background.
      thresholds: thresholds of benchmarks by their names, in place of `threshold`.
      competing_words: how many words competed for a pixel when the threshold was chosen. Shorter
        lists of classes get everyday words for the background until as many compete (see
        `distractors`); for longer lists the threshold follows, see `threshold_for`. 0: the words of
        the classes compete alone, and the threshold is taken as it is, as in published protocols.
      order: 'upsample_first' or 'argmax_first' (the order of Eq. 1).
      templates: prompts whose embeddings are averaged for each class, with {} for its name; in a
        config "clip" stands for all of CLIP's.
      affinity: where the patch-to-group map comes from, 'binding' (Eq. 4) or 'features' (Eq. 1).
      grouping: 'soft_patches', where a patch's score is the mean of its groups' cosines, or
        'one_group', where each pixel belongs to one group, and has its scores (see `one_group`).
      image_classes: with 'one_group', probabilities are multiplied by those among this many
        classes, the ones most like the whole window; 0 for all classes, without the product.
      cap_threshold: whether a threshold above every probability is lowered to the highest, so that
        something is always labeled: the highest of the image, or with 'one_group' of each window.
      average: what is averaged over the templates, 'unit' embeddings or 'raw' ones.
      resize: 'antialiased' or 'four_pixels', see `windows.resize_image`.
      grid: 'exact' or 'rounded_patch', see `windows.grid_shape`.
      averaged: what is averaged over windows and interpolated to pixels: 'probabilities', or
        'cosines', with the softmax over classes taken at each pixel.
      class_names: whose words stand for the classes of a benchmark, see `class_names`.
      min_area: classes found on less than this share of all foreground pixels are taken out, and
        their pixels go to the best of the other words; 0 for none.
      assignment: 'soft', or 'hard': each patch belongs to its best group alone.
      assignment_temperature: affinities are raised to the power 1 / temperature and divided by
        their sum over groups; below 1 sharper, 1 as they are.
      flip: average with the mirrored image.
      scales: factors on the resized image; what is found at all of them is averaged.
      pamr_steps, pamr_dilations: refinement by the image's own colors, see `refine`; 0 steps for
        none.
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
    assignment: str = "soft"
    assignment_temperature: float = 1.0
    flip: bool = False
    scales: tuple[float, ...] = (1.0,)
    pamr_steps: int = 0
    pamr_dilations: tuple[int, ...] = (1, 2, 4, 8, 12, 24)
    per_benchmark: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_order(self.order)
        for size in ("short_side", "long_limit", "window", "stride"):
            if getattr(self, size) < 1:
                raise UserError(f"protocol: {size} must be at least 1 pixel")
        for field, allowed in CHOICES.items():
            if getattr(self, field) not in allowed:
                raise UserError(
                    f"protocol: {field} is {getattr(self, field)!r}; it must be "
                    + " or ".join(map(repr, allowed))
                )
        if self.grouping == "one_group" and self.order != "upsample_first":
            raise UserError("protocol: grouping='one_group' needs order='upsample_first'")
        if self.grouping != "one_group" and self.image_classes:
            raise UserError("protocol: image_classes needs grouping='one_group'")
        for field in ("image_scale", "border_scale"):
            if getattr(self, field) < 0:
                raise UserError(f"protocol: {field} must be at least 0")
            if self.grouping == "one_group" and getattr(self, field):
                raise UserError(f"protocol: {field} needs grouping='soft_patches'")
            if self.averaged == "cosines" and getattr(self, field):
                raise UserError(f"protocol: {field} needs averaged='probabilities'")
        if self.scale is not None and self.scale <= 0:
            raise UserError(f"protocol: scale {self.scale} must be above 0, or none")
        for count in ("image_classes", "competing_words"):
            if getattr(self, count) < 0:
                raise UserError(f"protocol: {count} must be at least 0")
        if not self.templates or any("{}" not in text for text in self.templates):
            raise UserError("protocol: templates need at least one text, each with {} for the name")
        self._check_refinement()
        for name, fields in self.per_benchmark.items():
            self.replace(**_checked(fields, f"per_benchmark.{name}"), per_benchmark={})

    def _check_refinement(self) -> None:
        if not 0 <= self.min_area < 1:
            raise UserError("protocol: min_area is a share of the pixels, at least 0 and below 1")
        if self.assignment_temperature <= 0:
            raise UserError("protocol: assignment_temperature must be above 0")
        if not self.scales or min(self.scales) <= 0:
            raise UserError("protocol: scales need at least one factor, all above 0")
        if self.pamr_steps < 0 or not self.pamr_dilations or min(self.pamr_dilations) < 1:
            raise UserError("protocol: pamr_steps are at least 0, pamr_dilations at least 1 pixel")
        plain = self.grouping == "soft_patches" and self.order == "upsample_first"
        if not plain and (self.refined or self.averaged != "probabilities" or self.min_area):
            raise UserError(
                "protocol: flip, scales, pamr_steps, averaged='cosines' and min_area need "
                "grouping='soft_patches' and order='upsample_first'"
            )
        hard = self.assignment != "soft" or self.assignment_temperature != 1.0
        if self.grouping == "one_group" and hard:
            raise UserError(
                "protocol: assignment and assignment_temperature need grouping='soft_patches'; "
                "with 'one_group' each pixel has one group already"
            )

    @property
    def refined(self) -> bool:
        """Whether an image is seen more than once, or refined by its colors."""
        return self.flip or tuple(self.scales) != (1.0,) or self.pamr_steps > 0

    @property
    def views(self) -> tuple[tuple[float, bool], ...]:
        """(factor on the size, mirrored) of each time an image is seen."""
        sides = (False, True) if self.flip else (False,)
        return tuple((float(scale), side) for scale in self.scales for side in sides)

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | ConfigDict) -> "Protocol":
        """From a mapping with any of the fields, such as a ConfigDict or what `as_dict` gave.

        Raises:
          UserError: a field that does not exist, or a value that makes no sense.
        """
        known = {field.name for field in dataclasses.fields(cls)}
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
        """The protocol for classes that a person lists: `FEWEST_WORDS` compete if it says none."""
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


def _plain(config: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """Lists and ints of JSON and config files as the fields' own types."""
    values = {key: config[key] for key in config}
    kinds = {
        "scale": float,
        "image_scale": float,
        "border_scale": float,
        "threshold": float,
        "min_area": float,
        "assignment_temperature": float,
        "templates": lambda names: expand_templates(names) if len(names) else (),
        "scales": lambda factors: tuple(float(factor) for factor in factors),
        "pamr_dilations": lambda pixels: tuple(int(far) for far in pixels),
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
            name: _checked(fields, f"per_benchmark.{name}")
            for name, fields in dict(values["per_benchmark"]).items()
        }
    return values


def _checked(fields: Mapping[str, Any] | ConfigDict, where: str) -> dict[str, Any]:
    """The fields, if a benchmark may have values of its own for all of them."""
    known = {field.name for field in dataclasses.fields(Protocol)} - set(_TABLES)
    unknown = sorted(set(fields) - known)
    if unknown:
        raise UserError(f"protocol: {where} has unknown {', '.join(unknown)}")
    return _plain(fields)


def saved_protocol(info: Mapping[str, Any]) -> Protocol:
    """The protocol in a model directory's config.json.

    Directories of before `competing_words` have that number among their provenance.

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
