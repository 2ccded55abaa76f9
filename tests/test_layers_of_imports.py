"""Who may import whom, read from the source: imports only go down the list of layers. And how large
the package is: what a reader has to find the way in."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ovseg_jax"

# From the bottom up. A part may import what stands below it, and itself; the names on one line are
# neighbors that do not know each other.
LAYERS = [
    ["errors", "platforms", "progress", "shapes"],
    ["files", "flags", "sharding"],
    ["processes"],
    ["data", "optim", "losses", "models"],
    ["weights"],
    ["segmentation"],
    ["train"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
TOP = len(LAYERS)  # entry points

FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(module):
    """The part of the package that a dotted module name belongs to."""
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 else ""


def name_of(path):
    pieces = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(pieces[:-1] if pieces[-1] == "__init__" else pieces)


def imports_of(path):
    """Dotted names of all that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_only_go_down(path):
    own = part_of(name_of(path))
    level = LEVEL.get(own, TOP)
    for module in imports_of(path):
        if module.split(".")[0] != "ovseg_jax":
            continue
        other = part_of(module)
        if other in ("", own):
            continue
        assert (PACKAGE / other).is_dir() or (PACKAGE / f"{other}.py").exists(), module
        if own in LEVEL:
            assert LEVEL.get(other, TOP) < level, f"{name_of(path)} must not import {module}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_libraries_that_may_not_be_imported(path):
    # Data workers must not start a backend; TensorFlow is no part of this program, and torch is
    # an extra that reads its own files alone.
    forbidden = (
        {"tensorflow"} if name_of(path) == "ovseg_jax.weights.pth" else {"torch", "tensorflow"}
    )
    if part_of(name_of(path)) == "data":
        forbidden |= {"jax", "flax", "optax", "orbax"}
    assert not forbidden & {module.split(".")[0] for module in imports_of(path)}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_module_imports(path):
    if path.name != "__main__.py":
        importlib.import_module(name_of(path))


def test_every_folder_has_a_layer():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders <= set(LEVEL), f"give {folders - set(LEVEL)} a place in LAYERS"
    assert set(LEVEL) <= folders | {path.stem for path in PACKAGE.glob("*.py")}


def longest_chain(name, graph, known):
    """The longest chain of files that import one another, from `name` down."""
    if name not in known:
        chains = (longest_chain(other, graph, known) for other in graph[name])
        known[name] = [name, *max(chains, key=len, default=[])]
    return known[name]


def test_the_package_does_not_grow(capsys):
    """The limits are what was reached: where a change makes a number smaller, lower its limit."""
    names = {name_of(path): path for path in FILES}
    lines = {name: len(path.read_text().splitlines()) for name, path in names.items()}
    graph = {
        name: {
            target
            for module in imports_of(path)
            for target in (module, module.rpartition(".")[0])
            # The package itself imports lazily, for `ovseg_jax.load`.
            if target in names and target not in ("ovseg_jax", name)
        }
        for name, path in names.items()
    }
    known = {}
    chain = max((longest_chain(name, graph, known) for name in names), key=len)
    stems = [path.name for path in FILES if not path.name.startswith("__")]
    reached, ahead = set(), ["ovseg_jax.predict", "ovseg_jax.segmentation.api"]
    while ahead:
        if (name := ahead.pop()) not in reached:
            reached.add(name)
            ahead += graph[name]
    predict = {name for name in reached if names[name].name != "__init__.py"}
    numbers = {
        "files": (len(FILES), 106),
        "lines": (sum(lines.values()), 20_400),
        "files under 60 lines": (sum(count < 60 for count in lines.values()), 16),
        "files that predict imports": (len(predict), 28),
        "longest chain of imports": (len(chain), 13),
        "names that two files have": (len({x for x in stems if stems.count(x) > 1}), 0),
    }
    with capsys.disabled():
        print("\n" + "\n".join(f"{name}: {number}" for name, (number, _) in numbers.items()))
        print(" > ".join(chain))
    for name, (number, limit) in numbers.items():
        assert number <= limit, f"{name}: {number}, and at most {limit} are allowed"
