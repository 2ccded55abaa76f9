"""Evaluation sets read from their official folders, and as TFDS builders (see `builders`)."""

from ovseg_jax.data.benchmarks.class_tables import ClassTable, class_table
from ovseg_jax.data.benchmarks.folders import LabeledFolder
from ovseg_jax.data.benchmarks.layouts import OPENERS, open_train

__all__ = ["OPENERS", "ClassTable", "LabeledFolder", "class_table", "open_train"]
