"""What accelerators can do, and machines that are not here, described by name: "v5e:16x16"."""

import importlib.util
import math
import os
import re
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from ovseg_jax.errors import UserError
from ovseg_jax.flags import nearest

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      platform: "tpu" or "gpu".
      memory: bytes; the TPU compiler says how many of them a program may use.
      peak: dense bfloat16 matrix products, FLOP/s.
      options: what JAX needs beside the name to describe a topology of these chips.
    """

    platform: str
    memory: int
    peak: float
    options: tuple[tuple[str, str], ...] = ()


# TPUs: Google's documentation, "Cloud TPU system architecture", pages v4, v5e, v5p and v6e. GPUs:
# NVIDIA's data sheets of the SXM modules, without sparsity.
CHIPS = {
    # Its two cores work as one in training; by default JAX counts them as two devices.
    "v4": Chip("tpu", 32 * GIB, 275e12, (("chip_config_name", "megacore"),)),
    "v5e": Chip("tpu", 16 * GIB, 197e12),
    "v5p": Chip("tpu", 95 * GIB, 459e12),
    "v6e": Chip("tpu", 32 * GIB, 918e12),
    "a100": Chip("gpu", 80 * 10**9, 312e12),
    "h100": Chip("gpu", 80 * 10**9, 989e12),
    "h200": Chip("gpu", 141 * 10**9, 989e12),
}

# The chip of a device, by a part of the name that JAX gives it; the first match counts.
DEVICE_KINDS = (
    ("PCIe", None),  # slower than the modules of the table
    ("TPU v6 lite", "v6e"),
    ("TPU v6e", "v6e"),
    ("TPU v5 lite", "v5e"),
    ("TPU v5e", "v5e"),
    ("TPU v5", "v5p"),
    ("TPU v4", "v4"),
    ("A100", "a100"),
    ("H100", "h100"),
    ("H200", "h200"),
)

# libtpu reads these when it is loaded.
ENVIRONMENT = {
    # Otherwise it asks Google's metadata server which TPU this machine has.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Describes this machine, which has no TPU; without it libtpu warns. The topology decides.
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    # Compiling needs no chip, so another process may compile too.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def peak_flops(kind: str) -> float | None:
    """FLOP/s of a device by the name that JAX gives it; None where no table has it (CPUs)."""
    chip = next((chip for name, chip in DEVICE_KINDS if name in kind), None)
    return None if chip is None else CHIPS[chip].peak


@dataclass(frozen=True)
class Machine:
    """A grid of equal chips.

    Attributes:
      name: as the user gave it. count: number of chips.
    """

    name: str
    chip: Chip
    count: int

    def with_memory(self, memory: int) -> "Machine":
        """The same machine, where a program may use `memory` bytes of a chip."""
        return replace(self, chip=replace(self.chip, memory=memory))


def machine_of(name: str) -> Machine:
    """The machine that `name` describes.

    Raises:
      UserError: the name does not have the form CHIP:GRID, or the chip is not known.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if match is None:
        raise UserError(f"--topology={name} is not of the form CHIP:GRID, for example v5e:16x16")
    kind, sizes = match[1], [int(size) for size in match[2].split("x")]
    if kind not in CHIPS:
        raise UserError(
            f"--topology={name}: chip {kind!r} is none of {', '.join(CHIPS)}"
            + nearest(kind, list(CHIPS))
        )
    if math.prod(sizes) < 1:
        raise UserError(f"--topology={name} has no chip")
    return Machine(name, CHIPS[kind], math.prod(sizes))


def prepare_compiler() -> None:
    """Lets this process compile for TPUs and compute on its CPU. To be called before JAX starts."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")


def devices_of(machine: Machine) -> list[Any]:
    """The TPU devices of a machine, as its compiler describes them; nothing can run on them.

    Raises:
      UserError: the compiler is missing or in use, or knows no such machine.
    """
    if importlib.util.find_spec("libtpu") is None and not os.environ.get("TPU_LIBRARY_PATH"):
        raise UserError(
            "the TPU compiler is not installed: pip install 'ovseg_jax[aot]' (libtpu, 700 MB)"
        )
    try:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=machine.name, **dict(machine.chip.options)
        ).devices
    except (RuntimeError, ValueError) as error:
        line = str(error).splitlines()[0]
        if "lockfile" in str(error) or "already in use" in str(error):
            raise UserError(
                "libtpu thinks that another process uses it. If none does, an ended one left its "
                f"lock: remove /tmp/libtpu_lockfile ({line})"
            ) from None
        raise UserError(f"--topology={machine.name}: the TPU compiler says: {line}") from None
    if len(devices) != machine.count:
        raise UserError(
            f"--topology={machine.name}: {machine.count} chips are {len(devices)} devices to the "
            "compiler; is the grid one that is sold?"
        )
    return list(devices)


def available_memory(devices: list[Any]) -> int:
    """Bytes of one chip that a program may use, which is less than the chip has.

    The compiler says so only where a program does not fit, so this compiles one that cannot.

    Raises:
      UserError: the compiler said something else.
    """
    chip = SingleDeviceSharding(devices[0])
    too_much = jax.ShapeDtypeStruct((2**40,), jnp.uint8, sharding=chip)
    try:
        jax.jit(jnp.negative, out_shardings=chip).lower(too_much).compile()
    except jax.errors.JaxRuntimeError as error:
        if match := re.search(r"exceeds available HBM \(([\d.]+)G\)", str(error)):
            return int(float(match[1]) * GIB)
        raise UserError(
            "the TPU compiler does not say how much memory a chip has, but: "
            + str(error).splitlines()[0]
        ) from None
    raise UserError("the TPU compiler found room for a terabyte on one chip")
