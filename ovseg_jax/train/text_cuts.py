"""How many examples of a phase lost words to the text length."""

from collections.abc import Iterable, Iterator

import numpy as np

from ovseg_jax.data.loader import Batch


class TextCuts:
    """Takes the marks of examples whose texts were cut out of the batches, and counts them.

    Attributes:
      read, cut: examples that this process read, and those of them that lost words. Cached texts
        were counted when they were cached, and count as whole here.
    """

    def __init__(self) -> None:
        self.read = self.cut = 0

    def counted(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches without their marks, which no device needs."""
        for batch in batches:
            self.read += len(batch["weight"])
            self.cut += int(batch.pop("truncated", np.zeros(1)).sum())
            yield batch

    def note(self, phase: str, length: int) -> str:
        """What to say at the end of a phase in which texts were cut to `length` tokens."""
        return (
            f"note: {self.cut} of {self.read} examples in {phase} had a text cut to {length} "
            "tokens (config.data.text_length)"
        )
