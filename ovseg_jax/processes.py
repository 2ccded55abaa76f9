"""Several processes as one program: how they find each other, and who writes.

A job has one process for each host (TPU) or for each GPU. All run the same command; every process
feeds its own devices, and the first one alone writes logs and results.
"""

import contextlib
import glob
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ovseg_jax.errors import RESTART, UserError
from ovseg_jax.flags import Flag

AUTO = "auto"

FLAGS = (
    Flag("processes", default=AUTO, help="how many; auto asks Slurm, Open MPI or the TPU pod"),
    Flag("process_id", int, help="number of this process, from 0; with --processes=N"),
    Flag("coordinator", help="HOST:PORT on process 0's machine; with --processes=N"),
)

# Seconds that processes wait for the first one at the end, which evaluates and draws pictures.
LONGEST_END = 24 * 3600

# What launchers tell each of the processes that they start: (number of processes, own number).
_LAUNCHERS = {
    "Slurm": ("SLURM_NTASKS", "SLURM_PROCID"),
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
}
# Device files of TPUs, by generation of the driver.
_TPU_FILES = ("/dev/accel[0-9]*", "/dev/vfio/[0-9]*")


def join(args: SimpleNamespace) -> None:
    """Makes this process part of its job, by the values of `FLAGS`. Call before all else of JAX.

    Raises:
      UserError: flags that do not fit each other, or a job that does not come together.
    """
    named, number = args.coordinator, args.process_id
    if args.processes == AUTO:
        if named is not None or number is not None:
            raise UserError("--coordinator and --process_id need --processes=N")
        if launcher_of(os.environ) is not None:
            _initialize()
        return
    if not args.processes.isdigit() or int(args.processes) < 1:
        raise UserError(f"--processes is auto or a number from 1, not {args.processes!r}")
    count = int(args.processes)
    if count == 1:
        return
    if named is None or number is None:
        raise UserError(f"--processes={count} needs --coordinator=HOST:PORT and --process_id=I")
    if not 0 <= number < count:
        raise UserError(f"--process_id={number} must lie between 0 and {count - 1}")
    host, _, port = named.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator={named} is not of the form HOST:PORT")
    # "deactivate": named devices, if any, are those that CUDA_VISIBLE_DEVICES leaves.
    _initialize(
        coordinator_address=named,
        num_processes=count,
        process_id=number,
        cluster_detection_method="deactivate",
    )


def launcher_of(environment: Mapping[str, str]) -> str | None:
    """What started this process as one of several, or on a TPU (perhaps of a pod); else None."""
    for name, (count, own) in _LAUNCHERS.items():
        if own in environment and int(environment.get(count, "1")) > 1:
            return name
    wanted = environment.get("JAX_PLATFORMS", "")
    if wanted and "tpu" not in wanted.split(","):
        return None
    here = any(glob.glob(pattern) for pattern in _TPU_FILES)
    return "TPU" if here and importlib.util.find_spec("libtpu") is not None else None


def _initialize(**options: Any) -> None:
    # Takes effect on CPUs alone.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(shutdown_timeout_seconds=LONGEST_END, **options)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes of this job did not find each other: {error}. Check that every process "
            "runs, and that --coordinator is a free port on process 0's machine which the others "
            "reach; --processes=1 runs this process alone"
        ) from None


class OrderlyEnd(Exception):
    """An end that all processes of a job come to together."""


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """In a job of several processes, an error inside ends this process without any goodbye.

    Python's usual way out waits for the other processes, which wait for this one's part of their
    next step. A lost connection to another process is cured by starting the job again.
    """
    try:
        yield
    except OrderlyEnd:
        raise
    except Exception as error:
        if jax.process_count() == 1:
            raise
        who = f"process {jax.process_index()} of {jax.process_count()}"
        if why := _lost_connection(error):
            text, code = f"error: {who} has lost the others, or its device: {why}", RESTART
        elif isinstance(error, UserError):
            text, code = f"error: {who}: {error}", error.exit_code
        else:
            text, code = traceback.format_exc(), 1
        print(text, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(code)


def _lost_connection(error: BaseException | None) -> str:
    """What the runtime said, where the error or a cause of it is the runtime's; "" otherwise."""
    while error is not None:
        # A full memory is the runtime's error too, but comes again.
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXH" not in str(error):
            return str(error).splitlines()[0]
        error = error.__cause__ or error.__context__
    return ""


def is_first() -> bool:
    """Whether this process is the one that writes logs, results and models."""
    return jax.process_index() == 0


def any_process(value: bool) -> bool:
    """Whether `value` holds in any process of the job. Every process asks."""
    return bool(np.any(multihost_utils.process_allgather(np.array(value))))


def whole(leaf: jax.Array) -> Any:
    """An array as one NumPy array, also where its parts lie on several hosts. All must call it."""
    if leaf.is_fully_addressable or leaf.is_fully_replicated:
        return jax.device_get(leaf)
    return multihost_utils.process_allgather(leaf, tiled=True)


def local(tree: Any) -> Any:
    """A tree of arrays that this process can compute with alone, at its own time.

    The tree itself where there is one process; else copies on the host.
    """
    return tree if jax.process_count() == 1 else jax.tree.map(whole, tree)
