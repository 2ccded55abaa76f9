"""JAX's persistent compilation cache: a second start compiles nothing."""

import os
from pathlib import Path

import jax

# Programs that compile faster than this are not worth a file.
WORTH_KEEPING = 0.02


def enable_compilation_cache() -> None:
    """Keeps compiled programs in JAX_COMPILATION_CACHE_DIR, or ``.cache/jax`` where it is unset."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(Path(".cache/jax").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING)
