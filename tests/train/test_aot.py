"""Ahead-of-time compilation: what needs no TPU compiler, the command, and the real compiler."""

import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from ovseg_jax import aot, platforms, sharding
from ovseg_jax.data.captions import Masking
from ovseg_jax.errors import UserError
from ovseg_jax.progress import Progress
from ovseg_jax.train import chips, compile_ahead
from ovseg_jax.train.compile_ahead import Collective, Measured, batch_shapes, collectives_of
from ovseg_jax.train.config import load_config
from ovseg_jax.train.loop import TextCuts
from ovseg_jax.train.phases import make_phases
from ovseg_jax.train.run import make_run

ROOT = Path(__file__).parents[2]

# ---- collectives


@pytest.fixture(scope="module")
def looped():
    """A program with a gather, a reduction in a loop of three and one after it."""
    mesh = sharding.make_mesh()

    def per_device(x):
        whole = jax.lax.all_gather(x, "data", tiled=True)

        def body(carry, _):
            return jax.lax.psum(carry * 2.0, "data") * 0.1, None

        x, _ = jax.lax.scan(body, x, None, length=3)
        return jax.lax.psum(jnp.sum(x) + jnp.sum(whole), ("data",))

    split = PartitionSpec("data")
    call = jax.shard_map(
        per_device, mesh=mesh, in_specs=split, out_specs=PartitionSpec(), check_vma=False
    )
    x = jax.ShapeDtypeStruct((16, 5), jnp.float32, sharding=NamedSharding(mesh, split))
    return collectives_of(jax.jit(call).lower(x).compile().as_text())


def test_collectives_of_a_compiled_program(looped):
    (gather,) = [one for one in looped if one.kind == "all-gather"]
    assert gather.shapes == (("f32", (16, 5)),) and gather.bytes == 16 * 5 * 4
    assert "all_gather" in gather.source
    sizes = sorted(one.bytes for one in looped if one.kind == "all-reduce")
    assert sizes == [4, 2 * 5 * 4]  # that of the loop once


def test_links_of_a_chain_are_one_collective():
    """In the text of the TPU compiler, whose shapes have layouts."""
    text = """HloModule m
%body (p.1: (s32[], f32[4])) -> (s32[], f32[4]) {
  %r = (f32[4]{0:T(128)S(1)}, bf16[2,3]{1,0:T(8,128)(2,1)}) all-reduce(%a, %b), channel_id=3
}

%start (p.2: f32[2,8]) -> f32[16,8] {
  ROOT %g1 = f32[16,8]{1,0:T(8,128)} all-gather(%p.2), channel_id=1, attributes={chain_id="0"}
}

%link (p.3: f32[2,8]) -> f32[16,8] {
  ROOT %g2 = f32[16,8]{1,0:T(8,128)} all-gather(%p.3), channel_id=1, attributes={chain_id="0"}
}
"""
    assert collectives_of(text) == [
        Collective("all-reduce", (("f32", (4,)), ("bf16", (2, 3))), ""),
        Collective("all-gather", (("f32", (16, 8)),), ""),
    ]


# ---- operations


def test_operations_of_a_vision_transformer_are_those_of_its_formula():
    """ViT-B/16 on 196 patches and 8 groups: 12 layers of 24 T D^2 + 4 T^2 D, three times in all."""
    config = load_config("configs/vitb.py")
    config.loss.entity_weight = 0.0
    config.phases[0]["batch_size"] = 64
    machine = chips.machine_of("h100:8")
    found = compile_ahead.measured(config, machine, None, 0, 32)
    tokens, words, width = 204, 32, 768
    image = 12 * (24 * tokens * width**2 + 4 * tokens**2 * width)
    text = 12 * (24 * words * width**2 + 4 * words**2 * width)
    assert found.model_flops / 64 == pytest.approx(3 * (image + text), rel=0.05)
    assert found.model_flops < found.flops < 1.5 * found.model_flops
    assert found.fits is None and found.collectives is None
    # Parameters, two moments and the visual encoder's teacher, 4 bytes each; 8 images.
    state = 4 * (3 * found.parameters + 96_000_000)
    assert found.arguments == pytest.approx(state, rel=0.05)


# ---- shapes


@pytest.mark.parametrize("variant", ["", "cached"])
def test_a_batch_has_the_shapes_that_the_loader_gives(variant, tmp_path):
    config = load_config(f"tests/tiny.py:{variant}" if variant else "tests/tiny.py")
    config.data.cache_dir = str(tmp_path)
    run = make_run(config, Progress(quiet=True))
    if variant:
        run.fill_caches(run.initial_params(announce=False))
    for phase in run.phases:
        (batch, *_) = TextCuts().counted(run.loader(phase, phase.last - 1))
        wanted = batch_shapes(config, phase, phase.batch_size, run.text_length)
        assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
            name: (x.shape, x.dtype) for name, x in wanted.items()
        }


def test_a_batch_with_nouns_or_masked_tokens():
    config = load_config("configs/groupvit.py")
    (phase,) = make_phases(config, 10_000)
    batch = batch_shapes(config, phase, 16, 20)
    assert batch["noun_ids"].shape == (16, 3, 20) and batch["noun_present"].dtype == np.bool_
    config.loss.masking = Masking.MLM_GROUPS.value
    assert batch_shapes(config, phase, 16, 20)["masked_targets"].shape == (16, 20)


# ---- machines, messages, tables


def test_machines():
    machine = chips.machine_of("v5e:16x16")
    assert (machine.count, machine.chip.platform, machine.chip.peak) == (256, "tpu", 197e12)
    assert chips.machine_of("v4:2x2x4").count == 16
    for name, message in (
        ("v5e", "not of the form CHIP:GRID"),
        ("v5ee:4x4", "did you mean 'v5e'"),
        ("v5e:0x4", "has no chip"),
    ):
        with pytest.raises(UserError, match=message):
            chips.machine_of(name)


def test_without_the_compiler(monkeypatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'ovseg_jax\[aot\]'"):
        chips.devices_of(chips.machine_of("v5e:4x4"))


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ("Internal error when accessing libtpu multi-process lockfile", "/tmp/libtpu_lockfile"),
        ('INVALID_ARGUMENT: Topology layout "v5e:3x5" is not divisible\nmore', "v5e:3x5: the TPU"),
    ],
)
def test_what_the_compiler_refuses(monkeypatch, says, message):
    def refuse(**_):
        raise RuntimeError(says)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(chips.topologies, "get_topology_desc", refuse)
    with pytest.raises(UserError, match=message) as caught:
        chips.devices_of(chips.machine_of("v5e:3x5"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "says, total",
    [
        ("memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.75G.", 20.5),
        ("memory on HBM, the total memory required for HLO temporaries (20.50G) exceeds.", 20.5),
        ("something else", None),
    ],
)
def test_a_step_that_does_not_fit(says, total):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: Ran out of {says}")

    arguments, temporaries, found, collectives = compile_ahead.compiled(Lowered(), 2 * chips.GIB)
    assert collectives is None and arguments == 2 * chips.GIB
    if total is None:
        assert found is None and temporaries is None
    else:
        assert found == int(total * chips.GIB) and temporaries == int((total - 2) * chips.GIB)


def test_a_step_that_fits_says_what_it_takes():
    program = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((2**18,), jnp.float32))
    arguments, _, total, collectives = compile_ahead.compiled(program, 0)
    assert total >= 2**21 > arguments == 2**20 and collectives == []


def test_a_program_for_another_platform_rounds_as_that_one_does():
    from ovseg_jax.models.layers import contract

    product = lambda a, b: contract("nd,df->nf", a, b, jnp.bfloat16)  # noqa: E731
    spec = "bnqd,bntd->bnqt"  # one that this platform takes in float32
    attention = lambda a, b: contract(spec, a, b, jnp.bfloat16)  # noqa: E731
    a = jnp.ones((1, 2, 3, 4))
    assert "bf16" not in str(jax.make_jaxpr(attention)(a, a))
    with platforms.traced_for("tpu"):
        assert platforms.target() == "tpu"
        assert "bf16" in str(jax.make_jaxpr(lambda a, b: attention(a, b) + 0.0)(a, a))
    assert platforms.target() == "cpu"
    assert "bf16" in str(jax.make_jaxpr(product)(a[0, 0], a[0, 0].T))


# ---- the command


def _found(phase, batch_size, fits, total, **changes):
    values = {"arguments": 1, "temporaries": total - 1, "flops": 1, "collectives": [], **changes}
    return Measured(phase, batch_size, 1, total=total, fits=fits, model_flops=1, **values)


def test_the_tables():
    config = load_config("configs/vitb.py")
    machine = chips.machine_of("v5e:4x4")
    exchanged = [
        Collective("all-gather", (("f32", (2048, 256)),), "embeddings"),
        Collective("all-reduce", (("f32", (1024,)),), "gradients"),
    ]
    found = _found(
        "align", 2048, True, 5 * chips.GIB, flops=4 * 197 * 10**12, collectives=exchanged
    )
    text = aot.step_table(config, machine, [found])
    cells = {line[:28].strip(): line[28:].strip() for line in text.splitlines()}
    assert cells["mesh, data x fsdp x tensor"] == "16 x 1 x 1"
    assert cells["total"] == "5.00 GiB" and cells["of"] == "16.00 GiB"
    assert cells["ms per step at peak"] == "250.0"  # a quarter of a second: 4 / 16
    text = aot.collectives_table(found, 1.0)
    assert "f32[2048, 256]" in text and "2.0 MiB" in text and "all-reduce" not in text
    assert "f32[1024]" in aot.collectives_table(found, 0.0)


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

    monkeypatch.setattr(chips, "devices_of", lambda machine: [])
    monkeypatch.setattr(chips, "available_memory", lambda present: 15 * chips.GIB)
    monkeypatch.setattr(compile_ahead, "measured", measured)
    config = ["--config=configs/vitb.py", "--topology=v5e:2x2", "--search"]
    assert aot.main([*config, "--batch_size=100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "mesh 4 x 1 x 1, batch 100: 'phase 1' fits, 25.0 MiB a chip of 15.00 GiB"
    tried = "mesh 4 x 1 x 1, batch 400: 'phase 1' does not fit, 100.0 MiB a chip of 15.00 GiB"
    assert tried in lines
    rows = [line.split() for line in lines[-3:]]
    assert rows[0] == ["4", "x", "1", "x", "1", "200", "50"]
    assert rows[2] == ["1", "x", "2", "x", "2", "none", "-"]
    # The phase that needs most is asked first, and alone where it does not fit.
    assert [index for mesh, index, size in asked if size == 400 and mesh == (4, 1, 1)] == [1]
    monkeypatch.setitem(chips.CHIPS, "v5e", chips.CHIPS["v6e"])
    monkeypatch.setattr(
        compile_ahead, "measured", lambda config, *_: _found("all", 1, False, 2**40)
    )
    assert aot.main(config) == 1


@given(st.integers(1, 3000), st.integers(1, 512), st.integers(0, 10_000))
def test_search_finds_the_largest_of_its_sizes(start, step, room):
    tried = []

    def fits(size):
        tried.append(size)
        assert size % step == 0
        return size <= room

    found = aot.largest(fits, start, step)
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
        return _found("x", 2048, True, 1, flops=int(next(times)))

    monkeypatch.setattr(chips, "devices_of", lambda machine: [])
    monkeypatch.setattr(chips, "available_memory", lambda present: 15 * chips.GIB)
    monkeypatch.setattr(compile_ahead, "measured", measured)
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
    command = [sys.executable, "-m", "ovseg_jax.aot", "--config=tests/tiny.py"]
    ended = subprocess.run(
        [*command, "--topology=v5e:2x2", "--collectives_above=0"],
        cwd=ROOT, env=compiler, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert re.search(r"^fits +yes +yes$", ended.stdout, re.M)
    assert re.search(r"^  of +15.75 GiB +15.75 GiB$", ended.stdout, re.M)
    gathers = re.findall(r"^all-gather +(\w+)(\[.*?\])  +\d", ended.stdout, re.M)
    assert gathers
    for dtype, shape in gathers:
        *_, width = json.loads(shape)
        assert (dtype, width) == ("f32", 16), "16 is the width of the tiny model's embeddings"
