"""The devices of a machine that is not there, as the TPU compiler describes them."""

import importlib.util
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from ovseg_jax.errors import UserError
from ovseg_jax.train.aot.chips import GIB, Machine

# libtpu reads these when it is loaded.
ENVIRONMENT = {
    # It would ask Google's metadata server which TPU this machine has.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Of this machine, which has none: it would warn that it cannot tell. The topology decides.
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    # Compiling needs no chip, so another process may compile too.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def prepare() -> None:
    """Lets this process compile for TPUs and compute on its CPU. Call before JAX does anything."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")


def devices_of(machine: Machine) -> list[Any]:
    """The TPU devices of a machine; nothing can run on them.

    Raises:
      UserError: the compiler is not installed or in use, or knows no such machine.
    """
    if importlib.util.find_spec("libtpu") is None and not os.environ.get("TPU_LIBRARY_PATH"):
        raise UserError(
            "the TPU compiler is not installed: pip install 'ovseg_jax[aot]' (libtpu, 700 MB)"
        )
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=machine.name, **dict(machine.chip.options)
        ).devices
    except (RuntimeError, ValueError) as error:
        raise _explained(machine, error) from None
    if len(found) != machine.count:
        raise UserError(
            f"--topology={machine.name}: {machine.count} chips are {len(found)} devices to the "
            "compiler; is the grid one that is sold?"
        )
    return list(found)


def available_memory(present: list[Any]) -> int:
    """Bytes on one chip that a program may use, which is less than the chip has.

    The compiler tells it where a program does not fit, so it is given one.

    Raises:
      UserError: it said something else.
    """
    place = SingleDeviceSharding(present[0])
    too_much = jax.ShapeDtypeStruct((2**40,), jnp.uint8, sharding=place)
    try:
        jax.jit(jnp.negative, out_shardings=place).lower(too_much).compile()
    except jax.errors.JaxRuntimeError as error:
        if found := re.search(r"exceeds available HBM \(([\d.]+)G\)", str(error)):
            return int(float(found[1]) * GIB)
        raise UserError(
            "the TPU compiler does not say how much memory a chip has, but: "
            + str(error).splitlines()[0]
        ) from None
    raise UserError("the TPU compiler found room for a terabyte on one chip")


def _explained(machine: Machine, error: Exception) -> UserError:
    text = str(error)
    if "lockfile" in text or "already in use" in text:
        return UserError(
            "libtpu thinks that another process uses it. If none does, an ended one left its lock: "
            f"remove /tmp/libtpu_lockfile ({text.splitlines()[0]})"
        )
    return UserError(f"--topology={machine.name}: the TPU compiler says: {text.splitlines()[0]}")
