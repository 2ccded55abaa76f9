"""A run's work directory: one job at a time, its config and versions, what changed since."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

import ovseg_jax
from ovseg_jax import processes
from ovseg_jax.errors import RestartError, UserError
from ovseg_jax.segmentation.evaluate import write_result

LOCK = ".in_use"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers")

_ABSENT = object()


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Inside, no other job trains in the work directory: two would mix their steps and checkpoints.

    The first process holds a lock on ``WORKDIR/.in_use``, which the system releases however the
    process ends. On file systems without locks this protects from nothing.

    Raises:
      UserError: the directory cannot be written.
      RestartError: another job holds the lock.
    """
    if not processes.is_first():
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written: {error}") from None
    with file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = (workdir / LOCK).read_text(encoding="utf-8", errors="replace")
            raise RestartError(
                f"another job trains in --workdir={workdir} ({who or 'another process'}): wait for "
                "its end, or give another --workdir. Of a machine that is gone a network file "
                "system lets go after a minute or two"
            ) from None
        except OSError:
            pass  # no locks here
        with contextlib.suppress(OSError):  # a full disk is reported where something is lost by it
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield


def write_run_files(config: ConfigDict, workdir: Path) -> None:
    """Writes ``config.json`` and ``versions.json``, only in the first process.

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


def plain(config: ConfigDict) -> dict[str, Any]:
    """A config as JSON holds it: dicts, lists, strings, numbers."""
    return json.loads(config.to_json_best_effort(sort_keys=True))


def changed_fields(before: Any, now: Any, path: str = "config") -> list[str]:
    """One line for each field that differs: ``config.a.b: 1 -> 2``, sorted by path.

    Args:
      before, now: plain values (`plain`). path: their name.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        parts = [(f".{key}", key) for key in sorted({*before, *now})]
        pairs = [(name, before.get(key, _ABSENT), now.get(key, _ABSENT)) for name, key in parts]
    elif _has_fields(before) and _has_fields(now):
        pairs = [
            (f"[{i}]", *(items[i] if i < len(items) else _ABSENT for items in (before, now)))
            for i in range(max(len(before), len(now)))
        ]
    elif before is _ABSENT or now is _ABSENT or before != now:
        return [f"{path}: {_show(before)} -> {_show(now)}"]
    else:
        return []
    return [line for name, *pair in pairs for line in changed_fields(*pair, f"{path}{name}")]


def _has_fields(value: Any) -> bool:
    """Whether a list holds things with fields, as phases do."""
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


def _show(value: Any) -> str:
    return "absent" if value is _ABSENT else json.dumps(value)
