"""Exact two-way maps between a source's tensors and ours: fused, transposed and stacked ones.

A `Link` says how some source tensors become some of our parameters, and how they become the source
tensors again, to the bit. Unlike `convert_tree.Rule` it goes both ways, and one source may fill
several parameters.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ovseg_jax.weights.books import close_books
from ovseg_jax.weights.tensors import Tensors


@dataclass(frozen=True)
class Form:
    """How one source tensor looks among ours.

    Attributes:
      read: source tensor to our arrays, one for each target of the link.
      write: the inverse.
      axes: the number of axes of the source tensor.
      dtype: of our arrays.
    """

    read: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    write: Callable[[tuple[np.ndarray, ...]], np.ndarray]
    axes: int
    dtype: type = np.float32


def _patch_kernel(weight: np.ndarray) -> tuple[np.ndarray]:
    return (weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0]),)


def _patch_weight(parts: tuple[np.ndarray, ...]) -> np.ndarray:
    kernel = parts[0]
    side = math.isqrt(kernel.shape[0] // 3)
    return kernel.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


def _thirds(fused: np.ndarray) -> tuple[np.ndarray, ...]:
    # A length that three does not divide leaves unequal parts, which then fit no parameter.
    return tuple(np.array_split(fused, 3))


FORMS = {
    "scalar": Form(lambda x: (x,), lambda p: p[0], 0),
    "vector": Form(lambda x: (x,), lambda p: p[0], 1),
    "table": Form(lambda x: (x,), lambda p: p[0], 2),
    # linear weights are [out, in] there, [in, out] here
    "linear": Form(lambda x: (x.T,), lambda p: p[0].T, 2),
    # linear maps written as convolutions over one position, [out, in, 1]
    "pointwise": Form(lambda x: (x[:, :, 0].T,), lambda p: p[0].T[:, :, None], 3),
    # strided convolution [D, 3, P, P] to the flattened (row, column, channel) order of our patches
    "patch": Form(_patch_kernel, _patch_weight, 4),
    # tables with an axis of length one in front
    "token": Form(lambda x: (x[0],), lambda p: p[0][None], 3),
    # query, key and value in one linear map, in that order
    "fused_linear": Form(
        lambda x: tuple(part.T for part in _thirds(x)),
        lambda p: np.concatenate([part.T for part in p]),
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
    """

    targets: tuple[str, ...]
    sources: tuple[str, ...]
    form: str
    stacked: bool = False


def read_links(
    tensors: Tensors,
    links: Iterable[Link],
    shapes: Mapping[str, tuple[int, ...]],
    left_out: Iterable[str],
    origin: str,
) -> dict[str, np.ndarray]:
    """Our arrays from the source's: every tensor used once or named, every target filled once.

    Args:
      shapes: path and shape of every array that must be filled.
      left_out: names of source tensors that go elsewhere.
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
        missing = [name for name in link.sources if name not in tensors]
        flat = [n for n in link.sources if n in tensors and np.ndim(tensors[n]) != form.axes]
        faults += [f"{name} is missing (for {link.targets[0]})" for name in missing]
        faults += [
            f"{name} has shape {np.shape(tensors[name])}, but needs {form.axes} axes"
            for name in flat
        ]
        if missing or flat:
            continue
        layers = [form.read(np.asarray(tensors[name])) for name in link.sources]
        for target, parts in zip(link.targets, zip(*layers, strict=True), strict=True):
            wanted = tuple(shapes[target]) if target in shapes else None
            inner = wanted[1:] if wanted is not None and link.stacked else wanted
            wrong = [
                f"{target} needs {'no such parameter' if inner is None else inner} from {name}, "
                f"which gives {part.shape}"
                for name, part in zip(link.sources, parts, strict=True)
                if part.shape != inner
            ]
            faults += wrong
            if target in result:
                faults.append(f"{target} is filled twice")
            if wrong:
                continue
            if link.stacked:
                # In row-major order at once: stacked transposes would come out column-major, and
                # need twice the memory when they are written.
                result[target] = np.empty((len(parts), *inner), form.dtype)
                np.stack(parts, out=result[target], casting="unsafe")
            else:
                result[target] = np.array(parts[0], form.dtype, order="C")
    close_books(
        faults,
        tensors=tensors,
        used=[name for link in links for name in link.sources],
        left_out=left_out,
        wanted=shapes,
        reached=[target for link in links for target in link.targets],
        origin=origin,
    )
    return result


def write_links(arrays: Mapping[str, np.ndarray], links: Iterable[Link]) -> Tensors:
    """The source's tensors from ours, the inverse of `read_links`.

    Args:
      arrays: path to array; all that the links name.
    """
    result: Tensors = {}
    for link in links:
        form = FORMS[link.form]
        parts = tuple(np.asarray(arrays[target]) for target in link.targets)
        for index, name in enumerate(link.sources):
            one = tuple(part[index] for part in parts) if link.stacked else parts
            # Not `ascontiguousarray`, which makes a scalar a vector.
            result[name] = np.array(form.write(one), order="C")
    return result
