"""What a work directory says about its run: the resolved config and the versions used."""

import importlib.metadata
import platform
import sys
from pathlib import Path

import jax
from ml_collections import ConfigDict

import ovseg_jax
from ovseg_jax import processes
from ovseg_jax.errors import UserError
from ovseg_jax.segmentation.evaluate import write_result
from ovseg_jax.train.config_changes import plain

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers")


def write_run_files(config: ConfigDict, workdir: Path) -> None:
    """Writes ``config.json`` and ``versions.json``; the first process alone.

    Raises:
      UserError: the directory cannot be written.
    """
    if not processes.is_first():
        return
    versions = {
        "ovseg_jax": ovseg_jax.__version__,
        "python": platform.python_version(),
        "command": sys.argv,
        "devices": [str(device) for device in jax.devices()],
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }
    try:
        write_result(workdir / "config.json", plain(config))
        write_result(workdir / "versions.json", versions)
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error}") from None
