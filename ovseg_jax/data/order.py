"""Which record stands in which slot of which step, and the randomness of an example.

Both are pure functions, so a run does not depend on how many processes or workers read the
data, and resumes at any step. Nothing here has state.
"""

import hashlib

import grain
import numpy as np

from ovseg_jax.errors import UserError

# Feistel rounds of the index permutation; 4 is the least that Grain allows.
_ROUNDS = 4


def record_index(seed: int, n_records: int, position: int) -> tuple[int, int]:
    """(epoch, record index) of a position in the order of examples.

    Epochs follow one another without a gap, and every epoch is a permutation of the records of its
    own. Slot s of a step reads position p + s, where p examples came in the steps before. Needs no
    memory: the permutation is computed index by index.

    Raises:
      UserError: there are no records.
    """
    if n_records < 1:
        raise UserError("the data set has no records; check its path and its filters")
    epoch, offset = divmod(position, n_records)
    key = _digest(f"order/{seed}/{epoch}", 4)
    return epoch, int(grain.experimental.index_shuffle(offset, n_records - 1, key, _ROUNDS))


def part_seed(seed: int, part: int) -> int:
    """The seed of the order of one data set of a mixture: sets of one size differ in order too."""
    return _digest(f"part/{seed}/{part}", 8)


def example_rng(seed: int, epoch: int, key: str) -> np.random.Generator:
    """The generator of everything random about the record `key` in one epoch."""
    return np.random.Generator(np.random.Philox(key=_digest(f"example/{seed}/{epoch}/{key}", 16)))


def _digest(text: str, size: int) -> int:
    # Hashed rather than added up: neighboring seeds and epochs share nothing.
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=size).digest(), "little")
