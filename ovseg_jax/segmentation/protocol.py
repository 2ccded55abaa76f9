"""Everything that defines how label maps are made, stored with every result and every model."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.readout import check_order

CHOICES = {
    "affinity": ("binding", "features"),
    "grouping": ("soft_patches", "one_group"),
    "average": ("unit", "raw"),
    "resize": ("antialiased", "four_pixels"),
    "grid": ("exact", "rounded_patch"),
}


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
      threshold: a pixel whose best probability is lower is background; None where there is no
        background.
      thresholds: thresholds of benchmarks by their names, in place of `threshold`.
      order: 'upsample_first' or 'argmax_first' (the order of Eq. 1).
      templates: prompts whose embeddings are averaged for each class, with {} for its name.
      affinity: where the patch-to-group map comes from, 'binding' (Eq. 4) or 'features' (Eq. 1).
      grouping: 'soft_patches', where a patch's score is the mean of its groups' cosines, or
        'one_group', where each pixel belongs to one group, and has its scores (see `one_group`).
      image_classes: with 'one_group', probabilities are multiplied by those among this many
        classes, the ones most like the whole window; 0 for all classes, without the product.
      cap_threshold: with 'one_group', whether a threshold above every probability of a window is
        lowered to their maximum, so that something is always found.
      average: what is averaged over the templates, 'unit' embeddings or 'raw' ones.
      resize: 'antialiased' or 'four_pixels', see `windows.resize_image`.
      grid: 'exact' or 'rounded_patch', see `windows.grid_shape`.
    """

    name: str = "paper"
    short_side: int = 448
    long_limit: int = 2048
    window: int = 448
    stride: int = 224
    scale: float | None = 10.0
    image_scale: float = 0.0
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
        if self.grouping != "one_group" and (self.image_classes or self.cap_threshold):
            raise UserError("protocol: image_classes and cap_threshold need grouping='one_group'")
        if self.grouping == "one_group" and self.image_scale:
            raise UserError("protocol: image_scale needs grouping='soft_patches'")
        if self.image_classes < 0:
            raise UserError("protocol: image_classes must be at least 0")
        if not self.templates or any("{}" not in text for text in self.templates):
            raise UserError("protocol: templates need at least one text, each with {} for the name")

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | ConfigDict) -> "Protocol":
        """From a mapping with any of the fields, such as a ConfigDict or what `as_dict` gave."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(config) - known)
        if unknown:
            raise UserError(f"protocol: unknown {', '.join(unknown)}; there are: {sorted(known)}")
        values = {key: config[key] for key in config}
        kinds = {
            "scale": float,
            "image_scale": float,
            "threshold": float,
            "templates": tuple,
            "thresholds": dict,
        }
        for key, kind in kinds.items():
            if values.get(key) is not None:  # lists and ints of JSON and config files
                values[key] = kind(values[key])
        return cls(**values)

    def replace(self, **changes: Any) -> "Protocol":
        """A copy with some fields changed, for example a calibrated scale and threshold."""
        return dataclasses.replace(self, **changes)

    def for_benchmark(self, name: str) -> "Protocol":
        """The protocol with the threshold that `thresholds` has for this benchmark, if any."""
        return self.replace(threshold=self.thresholds.get(name, self.threshold), thresholds={})

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `from_config` reads them back."""
        values = {**dataclasses.asdict(self), "templates": list(self.templates)}
        return {**values, "thresholds": dict(self.thresholds)}


def names_hash(class_names: Sequence[str]) -> str:
    """Short hash of the class words in their order: other words are another protocol."""
    return hashlib.sha256("\n".join(class_names).encode()).hexdigest()[:12]
