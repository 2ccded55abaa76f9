"""The state dict inside a checkpoint file, wherever the training program put it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ovseg_jax.errors import UserError
from ovseg_jax.weights.torch_file import LARGEST_GROWTH, open_torch
from ovseg_jax.weights.torch_names import StoredArray, StoredTensor


@dataclass(frozen=True)
class StateDict:
    """The tensors of a checkpoint.

    Attributes:
      tensors: by name, without prefixes that wrappers of the model added.
      entry: where in the file they stood, "" for a bare state dict.
      left_out: names of entries beside them that are no tensors.
    """

    tensors: dict[str, np.ndarray]
    entry: str
    left_out: tuple[str, ...]


# Where training programs put the weights. Of a pair (DINO's), the one that is meant to be used.
ENTRIES = ("model", "state_dict", "module", "teacher", "model_state_dict", "net")
# Data parallelism and torch.compile put these before every name.
WRAPPERS = ("module.", "_orig_mod.")


def read_state_dict(path: str | Path, entry: str = "") -> StateDict:
    """The state dict in a checkpoint: an entry of it, or all of it.

    Args:
      entry: name of the entry; by default the first of `ENTRIES` that is there, at any depth.

    Raises:
      UserError: see `open_torch`; or there is no state dict.
    """
    file = open_torch(path)
    value, found = file.value, []
    for name in entry.split(".") if entry else ():
        if not isinstance(value, Mapping) or name not in value:
            have = ", ".join(map(str, value)) if isinstance(value, Mapping) else "no entries"
            raise UserError(f"{path} has no entry {entry!r}; it has: {have}")
        value = value[name]
        found.append(name)
    while isinstance(value, Mapping) and not _has_tensors(value):
        name = next((n for n in ENTRIES if isinstance(value.get(n), Mapping)), None)
        if name is None:
            break
        value = value[name]
        found.append(name)
    if not isinstance(value, Mapping) or not _has_tensors(value):
        held = ", ".join(map(str, list(value)[:20])) if isinstance(value, Mapping) else type(value)
        raise UserError(f"{path} holds no state dict; {'.'.join(found) or 'it'} has: {held}")
    tensors = {str(n): t for n, t in value.items() if isinstance(t, StoredTensor | StoredArray)}
    left_out = tuple(str(name) for name in value if str(name) not in tensors)
    arrays = {name: file.array(tensor, name) for name, tensor in tensors.items()}
    total = sum(array.nbytes for array in arrays.values())
    if total > LARGEST_GROWTH * file.nbytes:
        raise UserError(
            f"{path} describes tensors of {total} bytes, far more than the {file.nbytes} it holds; "
            "such a file is not read"
        )
    return StateDict(without_wrappers(arrays), ".".join(found), left_out)


def _has_tensors(value: Mapping[Any, Any]) -> bool:
    return any(isinstance(item, StoredTensor) for item in value.values())


def without_wrappers(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Removes the prefixes of `WRAPPERS`, as long as every name has one."""

    def common() -> str | None:
        return next((p for p in WRAPPERS if all(name.startswith(p) for name in tensors)), None)

    while tensors and (prefix := common()):
        tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors
