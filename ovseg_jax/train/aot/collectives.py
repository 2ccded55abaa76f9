"""The communication of a compiled program, read from its text."""

import re
from collections import defaultdict
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|called_computations)=\{?%?([\w.\-]+)")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BITS = {"pred": 8, "c64": 64, "c128": 128}


@dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Attributes:
      kind: one of `KINDS`.
      shapes: of its results on one device, such as ("f32", (2048, 256)).
      times: how often it happens in one run of the program: the lengths of the loops around it.
      source: JAX's name of the operation that it came from.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    times: int
    source: str

    @property
    def bytes(self) -> int:
        """Size of its results on one device, all times together."""
        return self.times * sum(_size(dtype, shape) for dtype, shape in self.shapes)


def collectives_of(text: str) -> list[Collective]:
    """All collectives of a program (`jax.stages.Compiled.as_text`).

    The TPU compiler writes one that runs beside computations into each of them, as links of a
    chain: it is listed once.
    """
    bodies = _computations(text)
    found, seen = [], set()
    times = _times(bodies)
    for name, lines in bodies.items():
        for line in lines:
            match = _COLLECTIVE.search(line)
            if match is None:
                continue
            chain = re.search(r'chain_id="(\d+)"', line)
            if chain is not None and chain[1] in seen:
                continue
            if chain is not None:
                seen.add(chain[1])
            shapes = tuple(
                (dtype, tuple(int(n) for n in dims.split(",") if n))
                for dtype, dims in _SHAPE.findall(re.sub(r"\{[^{}]*\}", "", match[1]))
            )
            if match[3] and match[2] != "all-reduce":
                shapes = shapes[len(shapes) // 2 :]  # the first half are the operands
            source = re.search(r'op_name="([^"]*)"', line)
            found.append(Collective(match[2], shapes, times[name], source[1] if source else ""))
    return found


def totals(collectives: list[Collective]) -> dict[str, tuple[int, int]]:
    """(how many, bytes on one device) in one run of the program, by kind."""
    sums: dict[str, tuple[int, int]] = {}
    for one in collectives:
        count, size = sums.get(one.kind, (0, 0))
        sums[one.kind] = (count + one.times, size + one.bytes)
    return sums


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    bits = _BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])
    count = 1
    for length in shape:
        count *= length
    return count * bits // 8


def _computations(text: str) -> dict[str, list[str]]:
    bodies: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head is not None:
            name = head[1]
            bodies[name] = []
        elif name:
            bodies[name].append(line)
    return bodies


def _times(bodies: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs: the product of the trip counts of the loops around it."""
    callers: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for name, lines in bodies.items():
        for line in lines:
            loop = _WHILE.search(line)
            trips = _trip_count(line, bodies.get(loop[1], [])) if loop is not None else 1
            for called in _CALLED.findall(line):
                callers[called].append((name, trips))
    known: dict[str, int] = {}

    def of(name: str) -> int:
        if name not in known:
            known[name] = 1  # called by no one, or (which never is) by itself
            known[name] = max((of(caller) * n for caller, n in callers[name]), default=1)
        return known[name]

    return {name: of(name) for name in bodies}


def _trip_count(line: str, condition: list[str]) -> int:
    """Trips of a loop: as the compiler notes it, else the constant that its counter stops at."""
    noted = _TRIPS.search(line)
    if noted is not None:
        return int(noted[1])
    limits = [int(n) for text in condition for n in re.findall(r"s32\[\].*constant\((\d+)\)", text)]
    return max(limits, default=1)
