"""The classes of the evaluation sets: names, words, label values, colors; from JSON in tables/."""

import functools
import json
from dataclasses import dataclass
from importlib import resources

import numpy as np
from jaxtyping import Integer, UInt8

IGNORE = 255  # pixels that count for nothing


class WrongLabels(ValueError):
    """A label file has values that the evaluation set does not have: it is of another kind."""


@dataclass(frozen=True)
class ClassTable:
    """The C classes of one evaluation set.

    Attributes:
      title, source, rule: in words, of the set, of the annotation, and how labels become classes.
      background: whether label 0 is background; then class i has label i + 1, otherwise i.
      largest: values in official label files reach from 0 to this.
      unlabeled: whether the value 255 may occur besides.
      names, words: the official names, and what prompts (of published models) call the classes.
      values, colors: of the classes in official label files, and RGB.
      absent: values that no official file has, though `largest` is above them.
    """

    title: str
    source: str
    rule: str
    background: bool
    largest: int
    unlabeled: bool
    names: tuple[str, ...]
    words: tuple[str, ...]
    values: tuple[int, ...]
    colors: tuple[tuple[int, int, int], ...]
    absent: tuple[int, ...] = ()

    def relabel(
        self,
        official: Integer[np.ndarray, "H W"],
        values: tuple[int, ...] | None = None,
        largest: int | None = None,
    ) -> UInt8[np.ndarray, "H W"]:
        """Labels from the values of an official file; `values` and `largest` replace the table's.

        Raises:
          WrongLabels: a value that cannot be there. Taken for background, or ignored, it would
            change scores silently: it shows that labels are of another set, or were shifted.
        """
        values = self.values if values is None else values
        largest = self.largest if largest is None else largest
        wrong = (official < 0) | (official > largest)
        if self.unlabeled:
            wrong &= official != IGNORE
        wrong |= np.isin(official, self.absent)
        if wrong.any():
            without = f" without {list(self.absent)}" if self.absent else ""
            known = f"0 to {largest}{without}{f' and {IGNORE}' if self.unlabeled else ''}"
            raise WrongLabels(f"have the value {int(official[wrong][0])}, and there are {known}")
        other = 0 if self.background else IGNORE  # pixels that belong to no class
        lookup = np.full(max(largest, IGNORE, *values) + 1, other, np.uint8)
        lookup[list(values)] = np.arange(len(values)) + self.background
        return lookup[official]

    def palette(self) -> list[int]:
        """256 colors as Pillow takes them: of the labels, and white for what is ignored."""
        colors = [(0, 0, 0)] * self.background + list(self.colors)
        colors += [(0, 0, 0)] * (IGNORE - len(colors)) + [(255, 255, 255)]
        return [channel for color in colors for channel in color]


@functools.cache
def class_table(name: str) -> ClassTable:
    """The table called `name`, such as 'voc'."""
    path = resources.files("ovseg_jax.data.benchmarks") / "tables" / f"{name}.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    classes = document.pop("classes")
    fields = {"names": "name", "words": "word", "values": "label"}
    lists = {field: tuple(entry[key] for entry in classes) for field, key in fields.items()}
    colors = tuple(tuple(entry["color"]) for entry in classes)
    absent = tuple(document.pop("absent", ()))
    return ClassTable(**document | lists | {"colors": colors, "absent": absent})
