"""The one conversion engine: which published tensors are which of our parameters, both ways.

A `Link` says how some source tensors become some of our parameters, and how the parameters become
the source tensors again, to the bit. A conversion is total: every source tensor is used once or
left out by name, and every parameter is filled once.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ovseg_jax.errors import UserError
from ovseg_jax.weights.tensors import Tensors

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Form:
    """How a source tensor of so many axes (None: any) differs from the parameters that it fills.

    `read` gives one array of `dtype` for each target of the link, `write` is its inverse.
    """

    read: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    write: Callable[[tuple[np.ndarray, ...]], np.ndarray]
    axes: int | None
    dtype: type = np.float32


def _patch_weight(arrays: tuple[np.ndarray, ...]) -> np.ndarray:
    (kernel,) = arrays
    side = math.isqrt(kernel.shape[0] // 3)
    return kernel.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


def _thirds(fused: np.ndarray) -> tuple[np.ndarray, ...]:
    # A length that is no multiple of three gives unequal thirds, which then fit no parameter.
    return tuple(np.array_split(fused, 3))


FORMS = {
    "same": Form(lambda x: (x,), lambda p: p[0], None),
    "scalar": Form(lambda x: (x,), lambda p: p[0], 0),
    "vector": Form(lambda x: (x,), lambda p: p[0], 1),
    "table": Form(lambda x: (x,), lambda p: p[0], 2),
    # Linear weights are [out, in] in PyTorch, [in, out] here.
    "linear": Form(lambda x: (x.T,), lambda p: p[0].T, 2),
    # Linear maps written as convolutions over one position, [out, in, 1].
    "pointwise": Form(lambda x: (x[:, :, 0].T,), lambda p: p[0].T[:, :, None], 3),
    # Strided convolution [D, 3, P, P] to the flattened (row, column, channel) order of our patches.
    "patch": Form(lambda x: (x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),), _patch_weight, 4),
    # Tables with an axis of length one in front.
    "token": Form(lambda x: (x[0],), lambda p: p[0][None], 3),
    # Query, key and value in one linear map, in that order.
    "fused_linear": Form(
        lambda x: tuple(third.T for third in _thirds(x)),
        lambda p: np.concatenate([kernel.T for kernel in p]),
        2,
    ),
    "fused_vector": Form(_thirds, lambda p: np.concatenate(p), 1),
    "count": Form(lambda x: (x,), lambda p: p[0].astype(np.int64), 0, np.int32),
}


@dataclass(frozen=True)
class Link:
    """Source tensors and the parameters that they are.

    Attributes:
      targets: our paths; several for a fused map.
      sources: names; with `stacked`, one for each layer of the targets' leading axis.
      form: key of `FORMS`.
      stacked: whether the targets are stacks of layers.
    """

    targets: tuple[str, ...]
    sources: tuple[str, ...]
    form: str
    stacked: bool = False


def linear(ours: str, *theirs: str, stacked: bool = False, form: str = "linear") -> list[Link]:
    """Weight and bias of a linear map, of one layer or of a stack of them."""
    return [
        Link((f"{ours}/kernel",), tuple(f"{name}.weight" for name in theirs), form, stacked),
        Link((f"{ours}/bias",), tuple(f"{name}.bias" for name in theirs), "vector", stacked),
    ]


def norm(ours: str, *theirs: str, stacked: bool = False) -> list[Link]:
    """Weight and bias of a LayerNorm or batch norm."""
    return [
        Link((f"{ours}/scale",), tuple(f"{name}.weight" for name in theirs), "vector", stacked),
        Link((f"{ours}/bias",), tuple(f"{name}.bias" for name in theirs), "vector", stacked),
    ]


def module(
    ours: str, theirs: Sequence[str], names: Mapping[str, str], stacked: bool = False
) -> list[Link]:
    """The norms and linear maps of a module.

    Args:
      ours: path of the module.
      theirs: prefix of the module, or with `stacked` of each layer; "" or with a final dot.
      names: what each map, or norm ("...norm"), is called behind the prefix, by its path in ours.
      stacked: see `Link`.
    """
    links = []
    for path, name in names.items():
        kind = norm if path.endswith("norm") else linear
        links += kind(f"{ours}/{path}", *(prefix + name for prefix in theirs), stacked=stacked)
    return links


def fused_attention(
    ours: str, theirs: Sequence[str], name: str, stacked: bool = False
) -> list[Link]:
    """Query, key and value that are one linear map in the source; see `module`.

    `name` is that of the map, up to "weight" and "bias".
    """
    links = []
    for leaf, kind, form in (("kernel", "weight", "linear"), ("bias", "bias", "vector")):
        targets = tuple(f"{ours}/{third}/{leaf}" for third in ("query", "key", "value"))
        sources = tuple(f"{prefix}{name}{kind}" for prefix in theirs)
        links.append(Link(targets, sources, f"fused_{form}", stacked))
    return links


def matching(tensors: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The names that one of the regular expressions matches from end to end."""
    either = re.compile("|".join(f"(?:{pattern})" for pattern in patterns))
    return [name for name in tensors if either.fullmatch(name)]


def read_links(
    tensors: Tensors,
    links: Iterable[Link],
    shapes: Shapes,
    left_out: Iterable[str],
    origin: str,
) -> dict[str, np.ndarray]:
    """Our arrays from the source's.

    Args:
      tensors: the source's, by name.
      links: what becomes of them.
      shapes: path and shape of every array that must be filled.
      left_out: names of source tensors that are not used, on purpose.
      origin: where the tensors come from, for messages.

    Returns:
      path to array.

    Raises:
      UserError: one message with every missing, unused, unfilled and misshapen tensor.
    """
    links = list(links)
    result: dict[str, np.ndarray] = {}
    faults: list[str] = []
    for link in links:
        form = FORMS[link.form]
        before = len(faults)
        for name in link.sources:
            if name not in tensors:
                faults.append(f"{name} is missing (for {link.targets[0]})")
            elif form.axes not in (None, np.ndim(tensors[name])):
                shape = np.shape(tensors[name])
                faults.append(f"{name} has shape {shape}, but needs {form.axes} axes")
        if len(faults) > before:
            continue
        layers = [form.read(np.asarray(tensors[name])) for name in link.sources]
        for target, arrays in zip(link.targets, zip(*layers, strict=True), strict=True):
            if target not in shapes:
                faults.append(f"{target} is not a parameter of this model")
                continue
            shape = tuple(shapes[target])[1:] if link.stacked else tuple(shapes[target])
            wrong = [
                f"{target} has shape {shape}, {name} gives {array.shape}"
                for name, array in zip(link.sources, arrays, strict=True)
                if array.shape != shape
            ]
            faults += wrong
            if target in result:
                faults.append(f"{target} is filled twice")
            if wrong:
                continue
            if link.stacked:
                # In row-major order at once: stacked transposes would come out column-major, and
                # need twice the memory when they are written.
                result[target] = np.empty((len(arrays), *shape), form.dtype)
                np.stack(arrays, out=result[target], casting="unsafe")
            else:
                result[target] = np.array(arrays[0], form.dtype, order="C")
    times = Counter(name for link in links for name in link.sources)
    faults += [f"{name} is used twice" for name in sorted(times) if times[name] > 1]
    unused = set(tensors) - set(times) - set(left_out)
    faults += [f"{name} has no place in this model" for name in sorted(unused)]
    unfilled = set(shapes) - {target for link in links for target in link.targets}
    faults += [f"{path} is not filled" for path in sorted(unfilled)]
    if faults:
        raise UserError(f"{origin} does not fit the model:\n  " + "\n  ".join(faults))
    return result


def write_links(arrays: Mapping[str, Any], links: Iterable[Link]) -> Tensors:
    """The source's tensors from our arrays (of NumPy or JAX), the inverse of `read_links`."""
    result: Tensors = {}
    for link in links:
        form = FORMS[link.form]
        stacks = tuple(np.asarray(arrays[target]) for target in link.targets)
        for index, name in enumerate(link.sources):
            layer = tuple(stack[index] for stack in stacks) if link.stacked else stacks
            # Not `ascontiguousarray`, which makes a scalar a vector.
            result[name] = np.array(form.write(layer), order="C")
    return result
