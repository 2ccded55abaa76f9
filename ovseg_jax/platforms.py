"""Which platform a program is traced for: the one that is present, or another one."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_TARGET = contextvars.ContextVar("target", default="")


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
