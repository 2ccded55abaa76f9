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
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ovseg_jax import aot, platforms, sharding
from ovseg_jax.aot import (
    GIB,
    Collective,
    Machine,
    Measured,
    batch_shapes,
    collectives_of,
    machine_of,
)
from ovseg_jax.errors import UserError
from ovseg_jax.models.layers import contract
from ovseg_jax.progress import Progress
from ovseg_jax.train.config import load_config
from ovseg_jax.train.metrics import matmul_flops, model_flops, peak_flops
from ovseg_jax.train.run import make_run

ROOT = Path(__file__).parents[1]


def test_collectives_of_a_compiled_program():
    """A gather, a reduction in a loop of three, which is listed once, and one after it."""
    mesh, split = sharding.make_mesh(), PartitionSpec("data")

    def per_device(x):
        whole = jax.lax.all_gather(x, "data", tiled=True)

        def body(carry, _):
            return jax.lax.psum(carry * 2.0, "data") * 0.1, None

        x, _ = jax.lax.scan(body, x, None, length=3)
        return jax.lax.psum(jnp.sum(x) + jnp.sum(whole), ("data",))

    call = jax.shard_map(
        per_device, mesh=mesh, in_specs=split, out_specs=PartitionSpec(), check_vma=False
    )
    x = jax.ShapeDtypeStruct((16, 5), jnp.float32, sharding=NamedSharding(mesh, split))
    listed = collectives_of(jax.jit(call).lower(x).compile().as_text())
    (gather,) = [each for each in listed if each.kind == "all-gather"]
    assert gather.shapes == (("f32", (16, 5)),) and gather.bytes == 16 * 5 * 4
    assert sorted(each.bytes for each in listed if each.kind == "all-reduce") == [4, 2 * 5 * 4]


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
        Collective("all-reduce", (("f32", (4,)), ("bf16", (2, 3)))),
        Collective("all-gather", (("f32", (16, 8)),)),
    ]


def test_operations_of_a_vision_transformer_are_those_of_its_formula():
    """ViT-B/16 on 196 patches and 8 groups: 12 layers of 24 T D^2 + 4 T^2 D, three times in all."""
    config = load_config(ROOT / "configs" / "vitb.py")
    config.loss.entity_weight = 0.0
    tokens, words, width, size = 204, 32, 768, 64
    config.phases[0]["batch_size"] = size
    program = aot.program_of(config, sharding.abstract_mesh(**config.mesh, count=8))
    phase = program.phases[0]
    batch = batch_shapes(config, phase, size, words)
    needed = model_flops(program, phase, batch)
    image = 12 * (24 * tokens * width**2 + 4 * tokens**2 * width)
    text = 12 * (24 * words * width**2 + 4 * words**2 * width)
    assert needed / size == pytest.approx(3 * (image + text), rel=0.05)
    taken = matmul_flops(program.step(phase), program.abstract_state(phase.frozen), batch)
    assert needed < taken < 1.5 * needed


@pytest.mark.parametrize("variant", ["", "cached"])
def test_a_batch_has_the_shapes_that_the_loader_gives(variant, tmp_path):
    config = load_config(f"{ROOT}/tests/tiny.py:{variant}".removesuffix(":"))
    config.data.cache_dir = str(tmp_path)
    config.data.scenes.count = 8
    run = make_run(config, Progress(quiet=True))
    if variant:
        run.fill_caches(run.initial_params(announce=False))
    for phase in run.phases:
        (batch, *_) = run.loader(phase, phase.last - 1)
        batch.pop("truncated", None)  # for the log
        wanted = batch_shapes(config, phase, phase.batch_size, run.text_length)
        assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
            name: (x.shape, x.dtype) for name, x in wanted.items()
        }


def test_a_program_for_another_platform_rounds_as_that_one_does():
    def program(spec, a, b):
        return str(jax.make_jaxpr(lambda a, b: contract(spec, a, b, jnp.bfloat16) + 0.0)(a, b))

    a = jnp.ones((1, 2, 3, 4))
    attention = "bnqd,bntd->bnqt"  # which this platform takes in float32
    assert "bf16" not in program(attention, a, a)
    with platforms.traced_for("tpu"):
        assert "bf16" in program(attention, a, a)
    assert platforms.target() == "cpu"
    assert "bf16" in program("nd,df->nf", a[0, 0], a[0, 0].T)


# ---- machines and their compiler


@pytest.mark.parametrize(
    ("name", "message"),
    [("v5e:0x4", "not of the form CHIP:GRID"), ("v5ee:4x4", "did you mean 'v5e'")],
)
def test_machines_that_are_none(name, message):
    assert all(peak_flops(kind) for kind, _ in aot.CHIPS.values())
    with pytest.raises(UserError, match=message):
        machine_of(name)


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ("Internal error when accessing libtpu multi-process lockfile", "/tmp/libtpu_lockfile"),
        ('INVALID_ARGUMENT: Topology layout "v5e:3x5" is not divisible\nmore', "v5e:3x5: the TPU"),
        ("", r"pip install 'ovseg_jax\[aot\]'"),  # it is not here
    ],
)
def test_what_the_compiler_refuses(monkeypatch, says, message):
    def refuse(**_):
        raise RuntimeError(says)

    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: says or None)
    monkeypatch.setattr(aot.topologies, "get_topology_desc", refuse)
    with pytest.raises(UserError, match=message) as caught:
        machine_of("v5e:3x5")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("says", "total"),
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

    wanted = {"fits": False, "total": total and int(total * GIB)}
    assert aot.compiled(Lowered()) == wanted


def test_a_step_that_fits_says_what_it_takes():
    program = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((2**18,), jnp.float32))
    found = Measured("x", 1, 1, 1, 1, **aot.compiled(program))
    assert found.fits and found.total >= 2**21 > found.arguments == 2**20
    assert found.collectives == ()


# ---- the command


def test_the_tables():
    large = Collective("all-gather", (("f32", (2048, 256)),))
    small = Collective("all-reduce", (("f32", (1024,)),))
    flops = 4 * 197 * 10**12
    found = Measured("align", 2048, 1, flops, 1, True, 1, 1, 5 * GIB, (large, small))
    config = load_config(ROOT / "configs" / "vitb.py")
    machine = Machine("v5e:4x4", [None] * 16, 16 * GIB, 197e12)
    text = aot.step_table(config, machine, [found])
    cells = {line[:28].strip(): line[28:].strip() for line in text.splitlines()}
    assert cells["mesh, data x fsdp x tensor"] == "16 x 1 x 1"
    assert cells["total"] == "5.00 GiB" and cells["of"] == "16.00 GiB"
    assert cells["ms per step at peak"] == "250"  # a quarter of a second: 4 / 16
    text = aot.collectives_table(found)
    assert "f32[2048, 256]" in text and " 2.00" in text and "all-reduce" not in text


@pytest.mark.parametrize(
    ("room", "best", "pairs"),
    [((100, 80), "200", "50"), ((100, 10), "24", "6"), ((0, 0), "none", "-")],
)
def test_search_doubles_and_halves_on_every_mesh(monkeypatch, capsys, room, best, pairs):
    """Chips that hold so many pairs in each of two phases, and none on a mesh with 'tensor'."""
    asked = []

    def measured(config, machine, index):
        batch_size = config.phases[index]["batch_size"]
        a_chip = batch_size // (config.mesh.data * config.mesh.fsdp)
        fits = config.mesh.tensor == 1 and a_chip <= room[index]
        asked.append((config.mesh.data, batch_size, index, fits))
        return Measured("ab"[index], batch_size, 1, 1, 1, fits, 1, total=a_chip * 2**20)

    machine = Machine("v5e:2x2", [None] * 4, 16 * GIB, 197e12)
    monkeypatch.setattr(aot, "machine_of", lambda name: machine)
    monkeypatch.setattr(aot, "measured", measured)
    size = [f"--config.phases[{index}].batch_size=98" for index in range(2)]
    command = [f"--config={ROOT}/configs/vitb.py", "--topology=v5e:2x2", "--search", *size]
    assert aot.main(command) == (best == "none")
    lines = capsys.readouterr().out.splitlines()
    fits = "fits" if room[1] > 25 else "does not fit"
    assert lines[0] == f"mesh 4 x 1 x 1, batch 100: 'b' {fits}, 0.02 GiB a chip of 16.00 GiB"
    rows = [line.split() for line in lines[-3:]]
    assert rows[0] == ["4", "x", "1", "x", "1", best, pairs]
    assert rows[2] == ["1", "x", "2", "x", "2", "none", "-"]
    # The phase that needs most is asked first, and alone where it does not fit.
    assert all((mesh, size, 1, True) in asked for mesh, size, index, _ in asked if index == 0)


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


# The command, listing collectives of any size.
EVERY_COLLECTIVE = """
import sys
from ovseg_jax import aot
aot.LISTED_BYTES = 0
sys.exit(aot.main(["--config=tests/tiny.py", "--topology=v5e:2x2"]))
"""


@pytest.mark.slow
def test_the_tpu_compiler_takes_the_step_with_its_callback(compiler):
    """Both phases on a data mesh: no all-gather but of embeddings, none around the callback."""
    ended = subprocess.run(
        [sys.executable, "-c", EVERY_COLLECTIVE],
        cwd=ROOT, env=compiler, capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert re.search(r"^fits +yes +yes$", ended.stdout, re.M)
    gathers = re.findall(r"^all-gather +(\w+)(\[.*?\])  +\d", ended.stdout, re.M)
    assert gathers
    for dtype, shape in gathers:
        *_, width = json.loads(shape)
        assert (dtype, width) == ("f32", 16), "16 is the width of the tiny model's embeddings"
