"""The command of ahead-of-time compilation: tables, search, cost, and the real TPU compiler."""

import dataclasses
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovseg_jax import aot
from ovseg_jax.errors import UserError
from ovseg_jax.flags import load_config
from ovseg_jax.train.aot import chips, measure, search, tables
from ovseg_jax.train.aot.collectives import Collective

ROOT = Path(__file__).parents[2]


def test_the_table():
    config = load_config("configs/vitb.py")
    machine = chips.machine_of("v5e:4x4")
    exchanged = [
        Collective("all-gather", (("f32", (2048, 256)),), 2, "embeddings"),
        Collective("all-reduce", (("f32", (1024, 1024)),), 6, "gradients"),
    ]
    memory = measure.Memory(2 * chips.GIB, 3 * chips.GIB, 5 * chips.GIB)
    found = measure.Measured(
        "align", 2048, 207_694_081, True, memory, 4 * 197 * 10**12, 2 * 197 * 10**12, exchanged
    )
    text = tables.step_table(config, machine, [found])
    cells = {line[:28].strip(): line[28:].strip() for line in text.splitlines()}
    assert cells["mesh, data x fsdp x tensor"] == "16 x 1 x 1"
    assert cells["total"] == "5.00 GiB" and cells["of"] == "16.00 GiB"
    assert cells["ms per step at peak"] == "250.0"  # a quarter of a second: 4 / 16
    assert cells["all-gather"] == "2, 4.0 MiB" and cells["all-reduce"] == "6, 24.0 MiB"
    assert "f32[2048, 256]" in tables.gather_table(found)
    assert tables.meshes_to_try(16) == [(16, 1, 1), (4, 4, 1), (1, 16, 1), (4, 2, 2)]


def _found(phase, batch_size, fits, total):
    return measure.Measured(
        phase, batch_size, 1, fits, measure.Memory(1, total - 1, total), 1, 1, []
    )


def test_search_doubles_and_halves_on_every_mesh(monkeypatch, capsys):
    """A chip that holds 100 pairs in the first phase, 80 in the second, none with 'tensor'."""
    asked = []

    def measured(config, machine, present, index, length):
        batch_size = config.phases[index]["batch_size"]
        asked.append((tuple(config.mesh.values()), index, batch_size))
        chips_of_batch = config.mesh.data * config.mesh.fsdp
        room = (100, 80)[index] if config.mesh.tensor == 1 else 0
        a_chip = batch_size // chips_of_batch
        return _found(f"phase {index}", batch_size, a_chip <= room, a_chip * 2**20)

    monkeypatch.setattr(aot.devices, "devices_of", lambda machine: [])
    monkeypatch.setattr(aot.devices, "available_memory", lambda present: 15 * chips.GIB)
    monkeypatch.setattr(aot.measure, "measured", measured)
    config = ["--config=configs/vitb.py", "--topology=v5e:2x2", "--search"]
    assert aot.main([*config, "--batch_size=100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "mesh 4 x 1 x 1, batch 100: fits, 25.0 MiB a chip"
    assert "mesh 4 x 1 x 1, batch 400: 'phase 1' does not fit, 100.0 MiB a chip" in lines
    rows = [line.split("  ") for line in lines[-3:]]
    rows = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert rows[0] == ["4 x 1 x 1", "200", "50", "50.0 MiB", "15.00 GiB", "400"]
    assert rows[2] == ["1 x 2 x 2", "none", "-", "-", "15.00 GiB", "2"]
    # The phase that needs most is asked first, and alone where it does not fit.
    assert [index for mesh, index, size in asked if size == 400 and mesh == (4, 1, 1)] == [1]
    monkeypatch.setitem(chips.CHIPS, "v5e", chips.CHIPS["v6e"])
    monkeypatch.setattr(aot.measure, "measured", lambda config, *_: _found("all", 1, False, 2**40))
    assert aot.main(config) == 1


@given(st.integers(1, 3000), st.integers(1, 512), st.integers(0, 10_000))
def test_search_finds_the_largest_of_its_sizes(start, step, room):
    tried = []

    def fits(size):
        tried.append(size)
        assert size % step == 0
        return size <= room

    found = search.largest(fits, start, step)
    if found is None:
        assert min(tried) > room and min(tried) < 2 * step
    else:
        assert found <= room and (2 * found > room or min(t for t in tried if t > found) > room)
    assert len(tried) == len(set(tried)) <= 16


def test_a_gpu_is_counted_without_a_compiler(capsys):
    code = aot.main(["--config=configs/quickstart.py", "--topology=h100:2"])
    assert code == 0
    text = capsys.readouterr().out
    assert "2 x 1 x 1" in text and "needs a GPU" in text
    with pytest.raises(UserError, match="--search needs a compiler"):
        aot.main(["--config=configs/quickstart.py", "--topology=h100:2", "--search"])
    with pytest.raises(UserError, match="does not divide over 7 batch shards"):
        aot.main(["--config=configs/quickstart.py", "--topology=h100:7"])


def test_hours_of_a_whole_run(monkeypatch, capsys):
    config = load_config("configs/vitb.py")
    machine = chips.machine_of("v5e:4x4")
    second = machine.count * machine.chip.peak
    steps = [62_988, 20_996]  # 30 and 10 epochs of 4.3 million pairs at batch 2048
    times = iter((0.2 * second, 0.4 * second))

    def measured(*_):
        found = _found("x", 2048, True, 1)
        return dataclasses.replace(found, flops=int(next(times)), model_flops=1)

    monkeypatch.setattr(aot.devices, "devices_of", lambda machine: [])
    monkeypatch.setattr(aot.devices, "available_memory", lambda present: 15 * chips.GIB)
    monkeypatch.setattr(aot.measure, "measured", measured)
    command = ["--config=configs/vitb.py", "--topology=v5e:4x4", "--pairs=4300000"]
    assert aot.main([*command, "--utilization=0.5"]) == 0
    lines = capsys.readouterr().out.splitlines()[-6:]
    rows = [re.split(r"  +", line) for line in lines]
    hours = [steps[0] * 0.4 / 3600, steps[1] * 0.8 / 3600]
    hours.append(sum(hours))
    names = [phase["name"] for phase in config.phases]
    assert rows[0] == ["at 50% of the peak", *names, "together"]
    assert rows[2] == ["steps", "62988", "20996", "83984"]
    assert rows[3][:3] == ["seconds per step", "0.4", "0.8"]
    for row, factor in zip(rows[4:], (1, 16), strict=True):
        np.testing.assert_allclose(
            [float(cell) for cell in row[1:]], np.multiply(hours, factor), 0.05
        )
    with pytest.raises(UserError, match="--utilization=1.5"):
        aot.main([*command, "--utilization=1.5"])


@pytest.fixture(scope="module")
def compiler():
    """Environment of a process that compiles for TPUs."""
    library = Path(sys.prefix, "tpu_compiler", "libtpu", "libtpu.so")
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        pytest.skip("the TPU compiler is for Linux on x86-64")
    if library.exists():
        return {**os.environ, "TPU_LIBRARY_PATH": str(library)}
    assert importlib.util.find_spec("libtpu"), f"no {library}: bash launch/test.sh installs it"
    return dict(os.environ)


@pytest.mark.slow
def test_the_tpu_compiler_takes_the_step_with_its_callback(compiler):
    """Both phases on a data mesh: no all-gather but of embeddings, none around the callback."""
    command = [sys.executable, "-m", "ovseg_jax.aot", "--config=tests/tiny.py", "--gathers"]
    ended = subprocess.run(
        [*command, "--topology=v5e:2x2"],
        cwd=ROOT, env=compiler, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert re.search(r"^fits +yes +yes$", ended.stdout, re.M)
    assert re.search(r"^  of +15.75 GiB +15.75 GiB$", ended.stdout, re.M)
    gathers = re.findall(r"^(\w+)(\[.*?\])  +\d", ended.stdout, re.M)
    assert gathers
    for dtype, shape in gathers:
        *_, width = json.loads(shape)
        assert (dtype, width) == ("f32", 16), "16 is the width of the tiny model's embeddings"
