"""What accelerators can do, and a machine of them described by name: "v5e:16x16", "h100:8"."""

import math
import re
from dataclasses import dataclass, replace

from ovseg_jax.errors import UserError
from ovseg_jax.flags import nearest

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      platform: "tpu" or "gpu".
      memory: bytes; of TPUs the compiler tells how much of it programs may use.
      peak: dense bfloat16 matrix products, FLOP/s.
      options: what JAX's description of a topology of them needs besides its name.
    """

    platform: str
    memory: int
    peak: float
    options: tuple[tuple[str, str], ...] = ()


# TPUs: Google's documentation, "Cloud TPU system architecture", pages v4, v5e, v5p and v6e. GPUs:
# NVIDIA's data sheets of the SXM modules, without sparsity.
CHIPS = {
    # Its two cores work as one in training; JAX counts them as two devices where it is not told.
    "v4": Chip("tpu", 32 * GIB, 275e12, (("chip_config_name", "megacore"),)),
    "v5e": Chip("tpu", 16 * GIB, 197e12),
    "v5p": Chip("tpu", 95 * GIB, 459e12),
    "v6e": Chip("tpu", 32 * GIB, 918e12),
    "a100": Chip("gpu", 80 * 10**9, 312e12),
    "h100": Chip("gpu", 80 * 10**9, 989e12),
    "h200": Chip("gpu", 141 * 10**9, 989e12),
}


@dataclass(frozen=True)
class Machine:
    """Chips in a grid.

    Attributes:
      name: as it was given. count: chips.
    """

    name: str
    chip: Chip
    count: int

    def with_memory(self, memory: int) -> "Machine":
        """The same, where a program may use so many bytes of a chip."""
        return replace(self, chip=replace(self.chip, memory=memory))


def machine_of(name: str) -> Machine:
    """The machine that `name` describes.

    Raises:
      UserError: it is not of the form, or the chip is not known.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if found is None:
        raise UserError(f"--topology={name} is not of the form CHIP:GRID, for example v5e:16x16")
    kind, sizes = found[1], [int(size) for size in found[2].split("x")]
    if kind not in CHIPS:
        raise UserError(
            f"--topology={name}: chip {kind!r} is none of {', '.join(CHIPS)}"
            + nearest(kind, list(CHIPS))
        )
    if math.prod(sizes) < 1:
        raise UserError(f"--topology={name} has no chip")
    return Machine(name, CHIPS[kind], math.prod(sizes))
