"""What programs are compiled for (this platform, or another one), and where they are kept."""

import contextlib
import contextvars
import os
from collections.abc import Iterator
from pathlib import Path

import jax

_TARGET = contextvars.ContextVar("target", default="")
# Seconds. Programs that compile faster than this are not worth a file.
_WORTH_KEEPING = 0.02


def enable_compilation_cache() -> None:
    """Keeps compiled programs in JAX_COMPILATION_CACHE_DIR, or else in ``.cache/jax``."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(Path(".cache/jax").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING)


def target() -> str:
    """The platform ("cpu", "gpu" or "tpu") that the program being traced will run on."""
    return _TARGET.get() or jax.default_backend()


@contextlib.contextmanager
def traced_for(platform: str) -> Iterator[None]:
    """Within it programs are traced for `platform`, to be compiled ahead of time."""
    token = _TARGET.set(platform)
    try:
        yield
    finally:
        _TARGET.reset(token)
