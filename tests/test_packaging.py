"""What a stranger installs: declared dependencies, files in the package, the launch scripts."""

import ast
import configparser
import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import ovseg_jax

ROOT = Path(__file__).parent.parent
SCRIPTS = ["launch/environment.sh", "launch/quickstart.sh", "launch/test.sh", ".ci/run"]

# Fixed as the tools of this project, whether or not a module imports them today.
CHOSEN = {"grain", "orbax-checkpoint", "tensorflow-datasets", "transformers"}
# Imported, but brought by a dependency that is declared.
BROUGHT_BY = {"google": "onnx"}  # google.protobuf


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    assert parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def requirements(text: str) -> dict[str, Requirement]:
    """Canonical name -> requirement, of a block of lines in setup.cfg."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    found = {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}
    assert len(found) == len(lines), f"a package is named twice: {lines}"
    return found


CORE = requirements(setup_cfg()["options"]["install_requires"])
EXTRAS = {name: requirements(text) for name, text in setup_cfg()["options.extras_require"].items()}


def imported_by_package() -> set[str]:
    """Canonical names of the distributions that modules of the package import, at any depth."""
    modules = set()
    for path in (ROOT / "ovseg_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.add(node.module)
    foreign = {name.split(".")[0] for name in modules} - set(sys.stdlib_module_names)
    # google is a folder that several distributions share, so no name of theirs would be right.
    known = packages_distributions() | {"google": ["google"], "orbax": ["orbax-checkpoint"]}
    return {canonicalize_name(known.get(name, [name])[0]) for name in foreign - {"ovseg_jax"}}


@pytest.mark.parametrize("name", CORE)
def test_core_dependencies_have_both_bounds(name):
    operators = {specifier.operator for specifier in CORE[name].specifier}
    assert operators == {">=", "<"}, f"{CORE[name]} needs a lower and an upper bound"


def test_no_framework_but_jax_in_the_core():
    assert not {"torch", "torchvision", "tensorflow", "tensorflow-cpu", "keras", "clu"} & set(CORE)


def test_extras_are_the_documented_ones():
    documented = "quickstart cuda tpu video aot export convert benchmarks beam dev"
    assert set(EXTRAS) == set(documented.split())
    assert all(EXTRAS.values())
    assert not any(set(extra) & set(CORE) - {"jax"} for extra in EXTRAS.values())


def test_what_is_imported_is_declared_and_nothing_else():
    imported = {BROUGHT_BY.get(name, name) for name in imported_by_package()}
    declared = set(CORE).union(*EXTRAS.values())
    assert not imported - declared, "imported by ovseg_jax, missing in setup.cfg"
    assert not set(CORE) - imported - CHOSEN, "in setup.cfg, imported nowhere in ovseg_jax"


def test_installed_versions_are_within_the_bounds():
    for requirement in (*CORE.values(), *EXTRAS["quickstart"].values()):
        assert requirement.specifier.contains(Version(version(requirement.name))), requirement


BUILD = """
import sys
from setuptools import Distribution
distribution = Distribution({"script_name": "setup.py"})  # a build always has the name
distribution.parse_config_files()
command = distribution.get_command_obj("build_py")
command.build_lib = sys.argv[1]
command.ensure_finalized()
command.run()
print(distribution.get_version())
"""


def files(root: Path) -> set[str]:
    every = [path for path in (root / "ovseg_jax").rglob("*") if path.is_file()]
    return {str(path.relative_to(root)) for path in every if path.suffix != ".pyc"}


def test_a_built_package_holds_every_file(tmp_path):
    """Gathered as a wheel's build does; it asks no registry and takes a second."""
    command = [sys.executable, "-c", BUILD, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == ovseg_jax.__version__
    assert files(tmp_path) == files(ROOT)
    for name in ("data/wordlists/abstract.txt", "shipped/photos/model.safetensors"):
        assert f"ovseg_jax/{name}" in files(tmp_path)


def test_shipped_models_are_small():
    for model in (ROOT / "ovseg_jax" / "shipped").glob("*"):
        assert sum(path.stat().st_size for path in model.iterdir()) <= 5e6, model


def test_weights_are_pinned_by_version_and_hash():
    text = (ROOT / "launch/weights.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    pins = [pin for pin in "\n".join(lines).replace("\\\n", " ").splitlines() if pin.strip()]
    assert len(pins) == 2
    for pin in pins:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+\s+--hash=sha256:[0-9a-f]{64}", pin), pin


@pytest.mark.parametrize("script", SCRIPTS)
def test_launch_scripts_parse_and_can_be_run(script):
    path = ROOT / script
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert os.access(path, os.X_OK)
    assert "set -euo pipefail" in path.read_text(encoding="utf-8")


def test_unsuitable_python_is_explained(tmp_path):
    # In a copy, so that the environment of this repository is left alone.
    (tmp_path / "launch").mkdir()
    script = tmp_path / "launch/environment.sh"
    script.write_text((ROOT / "launch/environment.sh").read_text())
    done = subprocess.run(
        ["bash", str(script), "quickstart"],
        env={**os.environ, "PYTHON": "/no/such/python"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: PYTHON=/no/such/python is no Python 3.11")
    assert not (tmp_path / ".venv").exists()
