"""The one conversion engine: which published tensors are which of our parameters, both ways.

A `Link` turns source tensors into parameters of ours, and these into the tensors again, to the bit.
A conversion is total: every source tensor is used once or left out by name, and every parameter is
filled once.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ovseg_jax.errors import UserError
from ovseg_jax.weights.weight_files import Tensors

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Form:
    """How a source tensor of so many axes (None: any) differs from the parameters that it fills.

    `read` gives one array of `dtype` for each target of the link, `write` is its inverse.
    """

    axes: int | None
    read: Callable[[np.ndarray], tuple[np.ndarray, ...]] = lambda x: (x,)
    write: Callable[[tuple[np.ndarray, ...]], np.ndarray] = lambda p: p[0]
    dtype: type = np.float32


def _patch_weight(arrays: tuple[np.ndarray, ...]) -> np.ndarray:
    (kernel,) = arrays
    side = math.isqrt(kernel.shape[0] // 3)
    return kernel.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


def _thirds(fused: np.ndarray) -> tuple[np.ndarray, ...]:
    # A length that is no multiple of three gives unequal thirds, which then fit no parameter.
    return tuple(np.array_split(fused, 3))


FORMS = {
    "same": Form(None),
    "scalar": Form(0),
    "vector": Form(1),
    "table": Form(2),
    # Linear weights are [out, in] in PyTorch, [in, out] here.
    "linear": Form(2, lambda x: (x.T,), lambda p: p[0].T),
    # Linear maps written as convolutions over one position, [out, in, 1].
    "pointwise": Form(3, lambda x: (x[:, :, 0].T,), lambda p: p[0].T[:, :, None]),
    # Strided convolution [D, 3, P, P] to the flattened (row, column, channel) order of our patches.
    "patch": Form(4, lambda x: (x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),), _patch_weight),
    # Tables with an axis of length one in front.
    "token": Form(3, lambda x: (x[0],), lambda p: p[0][None]),
    # Query, key and value in one linear map, in that order.
    "fused_linear": Form(
        2,
        lambda x: tuple(third.T for third in _thirds(x)),
        lambda p: np.concatenate([kernel.T for kernel in p]),
    ),
    "fused_vector": Form(1, _thirds, lambda p: np.concatenate(p)),
    "count": Form(0, write=lambda p: p[0].astype(np.int64), dtype=np.int32),
}


@dataclass(frozen=True)
class Link:
    """Source tensors and the parameters that they are.

    Attributes:
      targets: our paths; several for a fused map.
      sources: names; where the targets are `stacked`, one for each layer of their leading axis.
      form: key of `FORMS`.
    """

    targets: tuple[str, ...]
    sources: tuple[str, ...]
    form: str
    stacked: bool = False


def linear(
    ours: str, *theirs: str, stacked: bool = False, form: str = "linear", weight: str = "kernel"
) -> list[Link]:
    """Weight and bias of a linear map, of one layer or of a stack of them."""
    return [
        Link((f"{ours}/{weight}",), tuple(f"{name}.weight" for name in theirs), form, stacked),
        Link((f"{ours}/bias",), tuple(f"{name}.bias" for name in theirs), "vector", stacked),
    ]


# Weight and bias of a LayerNorm or batch norm.
norm = functools.partial(linear, form="vector", weight="scale")


def module(
    ours: str, theirs: Sequence[str], names: Mapping[str, str], stacked: bool = False
) -> list[Link]:
    """The norms and linear maps of a module at the path `ours`.

    Args:
      theirs: prefix of the module, or with `stacked` of each layer; "" or with a final dot.
      names: what each map, or norm ("...norm"), is called behind the prefix, by its path in ours.
    """
    links = []
    for path, name in names.items():
        kind = norm if path.endswith("norm") else linear
        links += kind(f"{ours}/{path}", *(prefix + name for prefix in theirs), stacked=stacked)
    return links


def fused_attention(
    ours: str, theirs: Sequence[str], name: str, stacked: bool = False
) -> list[Link]:
    """Query, key and value that are one linear map, `name`, in the source; see `module`."""
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
    tensors: Tensors, links: Sequence[Link], shapes: Shapes, left_out: Iterable[str], origin: str
) -> dict[str, np.ndarray]:
    """Our arrays by path, from the source's by name.

    Args:
      shapes: path and shape of every array that must be filled.
      left_out: names of source tensors that are not used, on purpose.
      origin: where the tensors come from, for messages.

    Raises:
      UserError: one message with every missing, unused, unfilled and misshapen tensor.
    """
    result: dict[str, np.ndarray] = {}
    sources = Counter(name for link in links for name in link.sources)
    targets = Counter(path for link in links for path in link.targets)
    faults = [f"{name} is used twice" for name, times in sources.items() if times > 1]
    faults += [f"{path} is filled twice" for path, times in targets.items() if times > 1]
    faults += [f"{path} is not a parameter of this model" for path in targets if path not in shapes]
    faults += [f"{path} is not filled" for path in sorted(set(shapes) - set(targets))]
    unused = set(tensors) - set(sources) - set(left_out)
    faults += [f"{name} has no place in this model" for name in sorted(unused)]
    for link in links:
        form = FORMS[link.form]
        lost = [name for name in link.sources if name not in tensors]
        faults += [f"{name} is missing (for {link.targets[0]})" for name in lost]
        given = {name: np.shape(tensors[name]) for name in link.sources if name not in lost}
        odd = [name for name, shape in given.items() if form.axes not in (None, len(shape))]
        faults += [f"{name} has shape {given[name]}, but needs {form.axes} axes" for name in odd]
        if lost or odd:
            continue
        layers = [form.read(np.asarray(tensors[name])) for name in link.sources]
        for target, arrays in zip(link.targets, zip(*layers, strict=True), strict=True):
            shape = tuple(shapes.get(target, ()))
            shape = shape[1:] if link.stacked else shape
            named = zip(link.sources, arrays, strict=True)
            wrong = [f"{name} gives {array.shape}" for name, array in named if array.shape != shape]
            faults += [f"{target} has shape {shape}, {reason}" for reason in wrong]
            if not wrong:
                # In row-major order at once: stacked transposes would come out column-major, and
                # need twice the memory when they are written.
                whole = np.empty((len(arrays), *shape), form.dtype)
                np.stack(arrays, out=whole, casting="unsafe")
                result[target] = whole if link.stacked else whole.reshape(shape)
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


# ---- sizes of a model, from its checkpoint


@dataclass(frozen=True)
class Sizes:
    """Shapes of a checkpoint's tensors by name; `kind` says what it should be, for messages."""

    tensors: Mapping[str, Any]
    kind: str

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        """The shape of a tensor; UserError if it is missing or has another number of axes."""
        if name not in self.tensors:
            first = ", ".join(list(self.tensors)[:3])
            raise UserError(f"no {self.kind}: it has no tensor {name}, but {first}, ...")
        shape = tuple(np.shape(self.tensors[name]))
        if len(shape) != axes:
            raise UserError(f"{name} has shape {shape}, but needs {axes} axes")
        return shape

    def depth(self, prefix: str) -> int:
        """How many numbered layers, "PREFIX.0." and on, there are."""
        pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
        numbers = {int(match[1]) for match in map(pattern.match, self.tensors) if match}
        return max(numbers, default=-1) + 1

    def ratio(self, name: str, width: int) -> float:
        """What the width is multiplied by, and cut to an integer, for a feed-forward's weight."""
        hidden = self.shape(name, 2)[0]
        ratio = hidden / width
        return ratio if int(ratio * width) == hidden else math.nextafter(ratio, math.inf)


def grid_of(positions: int, grid: tuple[int, int] | None, name: str) -> tuple[int, int]:
    """Rows and columns of the position embeddings `name`; UserError if the grid does not fit."""
    side = math.isqrt(positions)
    rows, columns = grid or (side, side)
    if rows * columns != positions or not positions:
        raise UserError(f"{name} has {positions} positions, which is no grid of {rows} x {columns}")
    return rows, columns
