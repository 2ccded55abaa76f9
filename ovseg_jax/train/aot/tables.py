"""What `measure` found, as tables to read."""

import math
from collections.abc import Sequence

from ml_collections import ConfigDict

from ovseg_jax.progress import table
from ovseg_jax.train.aot.chips import Machine
from ovseg_jax.train.aot.collectives import totals
from ovseg_jax.train.aot.measure import Measured, abstract_mesh, peak_seconds

# Chips along data, fsdp and tensor.
Mesh = tuple[int, int, int]

GPU_NOTE = (
    "The GPU compiler chooses its kernels by timing them and needs a GPU: temporaries, collectives "
    "and\nwhether it fits stay unknown here. Arguments, operations and the time at peak are exact."
)


def size(count: int | float) -> str:
    """Bytes for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def step_table(config: ConfigDict, machine: Machine, found: Sequence[Measured]) -> str:
    """One column for each phase."""
    mesh = " x ".join(map(str, abstract_mesh(**config.mesh, count=machine.count).shape.values()))
    chip = machine.chip

    def row(label: str, cells: Sequence[str]) -> tuple[str, ...]:
        return (label, *cells)

    rows = [
        row(machine.name, [one.phase for one in found]),
        row("chips", [str(machine.count)] * len(found)),
        row("global batch", [str(one.batch_size) for one in found]),
        row("mesh, data x fsdp x tensor", [mesh] * len(found)),
        row("parameters", [f"{one.parameters / 1e6:.1f} M" for one in found]),
        row("HBM per chip: arguments", [size(one.memory.arguments) for one in found]),
        row("  temporaries", [_or_dash(one.memory.temporaries) for one in found]),
        row("  total", [_or_dash(one.memory.total) for one in found]),
        row("  of", [size(chip.memory)] * len(found)),
        row("fits", [{True: "yes", False: "no", None: "-"}[one.fits] for one in found]),
        row("TFLOPs per step", [digits(one.flops / 1e12) for one in found]),
        row("  without rematerialization", [digits(one.model_flops / 1e12) for one in found]),
        row("GFLOPs per pair", [digits(one.flops / one.batch_size / 1e9) for one in found]),
        row("ms per step at peak", [digits(1e3 * peak_seconds(one, machine)) for one in found]),
    ]
    sums = [totals(one.collectives or []) for one in found]
    for kind in sorted({kind for one in sums for kind in one}):
        rows.append(
            row(
                kind,
                [f"{one[kind][0]}, {size(one[kind][1])}" if kind in one else "-" for one in sums],
            )
        )
    text = table(rows)
    return f"{text}\n\n{GPU_NOTE}" if chip.platform == "gpu" else text


def gather_table(found: Measured) -> str:
    """The all-gathers of a step, largest first."""
    gathers = [one for one in found.collectives or [] if one.kind == "all-gather"]
    if not gathers:
        return f"{found.phase}: no all-gather"
    rows = [(f"{found.phase}: all-gathers", "times", "bytes")]
    for one in sorted(gathers, key=lambda one: -one.bytes):
        shapes = ", ".join(f"{dtype}{list(shape)}" for dtype, shape in one.shapes)
        rows.append((shapes, str(one.times), size(one.bytes)))
    return table(rows)


def digits(value: float) -> str:
    """One decimal, or as many as show two digits of a small number; none for a large one."""
    if value >= 1000:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2g}"


def _or_dash(count: int | None) -> str:
    return "-" if count is None else size(count)


# ---- search


def meshes_to_try(count: int) -> list[Mesh]:
    """Data parallelism alone; parameters split over 4, over all chips, and over tensor too."""
    found = [(count, 1, 1), (count // 4, 4, 1), (1, count, 1), (count // 4, 2, 2)]
    return list(dict.fromkeys(mesh for mesh in found if math.prod(mesh) == count and 0 not in mesh))


def search_line(mesh: Mesh, batch_size: int, found: Sequence[Measured]) -> str:
    """What a try gave, as it is made."""
    fits = "fits" if all(one.fits for one in found) else f"{found[-1].phase!r} does not fit"
    most = max(one.memory.total or 0 for one in found)
    return f"mesh {_shape(mesh)}, batch {batch_size}: {fits}, {size(most)} a chip"


def search_table(tried: Sequence[tuple[Mesh, int, Sequence[Measured]]], machine: Machine) -> str:
    """The largest batch that fits on each mesh, with the phase that needs most."""
    lines = [("mesh", "largest batch", "pairs a chip", "HBM a chip", "of", "does not fit")]
    for mesh in dict.fromkeys(mesh for mesh, _, _ in tried):
        mine = [(batch, found) for one, batch, found in tried if one == mesh]
        good = {
            batch: max(one.memory.total or 0 for one in found)
            for batch, found in mine
            if all(one.fits for one in found)
        }
        bad = [batch for batch, _ in mine if batch not in good]
        best = max(good, default=None)
        lines.append(
            (
                _shape(mesh),
                "none" if best is None else str(best),
                "-" if best is None else f"{best / machine.count:g}",
                "-" if best is None else size(good[best]),
                size(machine.chip.memory),
                str(min(bad)) if bad else "-",
            )
        )
    return table(lines)


def _shape(mesh: Mesh) -> str:
    return " x ".join(map(str, mesh))
