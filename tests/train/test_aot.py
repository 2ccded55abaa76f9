"""The parts of ahead-of-time compilation that need no TPU compiler."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ovseg_jax import platforms, sharding
from ovseg_jax.data.masking import Masking
from ovseg_jax.errors import UserError
from ovseg_jax.flags import load_config
from ovseg_jax.progress import Progress
from ovseg_jax.train.aot import chips, devices, measure
from ovseg_jax.train.aot.collectives import collectives_of, totals
from ovseg_jax.train.aot.inputs import batch_shapes
from ovseg_jax.train.flops import matmul_flops
from ovseg_jax.train.phases import make_phases
from ovseg_jax.train.run import make_run
from ovseg_jax.train.text_cuts import TextCuts

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
    assert gather.shapes == (("f32", (16, 5)),) and gather.times == 1
    assert gather.bytes == 16 * 5 * 4
    assert "all_gather" in gather.source
    times = sorted(one.times for one in looped if one.kind == "all-reduce")
    assert times == [1, 3]
    assert totals(looped)["all-reduce"] == (4, 3 * 2 * 5 * 4 + 4)


def test_links_of_a_chain_are_one_collective():
    """The text of the TPU compiler: layouts in shapes, trip counts in the loops' conditions."""
    text = """HloModule m
%cond (p: (s32[], f32[4])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[4]{0:T(128)}) parameter(0)
  %limit = s32[]{:T(128)} constant(6)
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (p.1: (s32[], f32[4])) -> (s32[], f32[4]) {
  %r = (f32[4]{0:T(128)S(1)}, bf16[2,3]{1,0:T(8,128)(2,1)}) all-reduce(%a, %b), channel_id=3
  ROOT %t = (s32[]{:T(128)}, f32[4]{0:T(128)}) tuple(%i, %x)
}

%start (p.2: f32[2,8]) -> f32[16,8] {
  ROOT %g1 = f32[16,8]{1,0:T(8,128)} all-gather(%p.2), channel_id=1, attributes={chain_id="0"}
}

%link (p.3: f32[2,8]) -> f32[16,8] {
  ROOT %g2 = f32[16,8]{1,0:T(8,128)} all-gather(%p.3), channel_id=1, attributes={chain_id="0"}
}

ENTRY %main (x: f32[2,8]) -> f32[16,8] {
  %w = (s32[]{:T(128)}, f32[4]{0:T(128)}) while(%t.1), condition=%cond, body=%body
  %f = f32[16,8]{1,0} fusion(%x), kind=kCustom, calls=%start
  ROOT %g = f32[16,8]{1,0} fusion(%x), kind=kCustom, calls=%link
}
"""
    assert totals(collectives_of(text)) == {
        "all-reduce": (6, 6 * (16 + 12)),
        "all-gather": (1, 16 * 8 * 4),
    }


# ---- operations


def test_operations_of_matrix_products():
    a, b = jnp.ones((2, 3, 4)), jnp.ones((2, 4, 5))
    product = 2 * 2 * 3 * 4 * 5
    assert matmul_flops(lambda a, b: a @ b, a, b) == product

    def looped(a, b):
        def body(carry, _):
            return carry + jnp.sum(a @ b), None

        return jax.lax.scan(body, jnp.float32(0), None, length=7)[0]

    assert matmul_flops(looped, a, b) == 7 * product
    # The gradient with respect to both operands is two more products of the same size.
    loss = lambda a, b: jnp.sum(jnp.sin(a @ b))  # noqa: E731
    assert matmul_flops(jax.grad(loss, (0, 1)), a, b) == 3 * product
    again = jax.checkpoint(loss)
    assert matmul_flops(jax.grad(again, (0, 1)), a, b) == 4 * product
    mesh = sharding.make_mesh()
    everywhere = jax.shard_map(
        lambda a, b: a @ b, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec()
    )
    assert matmul_flops(everywhere, a, b) == 8 * product
    either = lambda a, b: jax.lax.cond(a[0, 0, 0] > 0, jnp.matmul, lambda a, b: 0 * (a @ b), a, b)  # noqa: E731
    assert matmul_flops(either, a, b) == product


def test_operations_of_a_vision_transformer_are_those_of_its_formula():
    """ViT-B/16 on 196 patches and 8 groups: 12 layers of 24 T D^2 + 4 T^2 D, three times in all."""
    config = load_config("configs/vitb.py")
    config.loss.entity_weight = 0.0
    config.phases[0]["batch_size"] = 64
    machine = chips.machine_of("h100:8")
    found = measure.measured(config, machine, None, 0, 32)
    tokens, words, width = 204, 32, 768
    image = 12 * (24 * tokens * width**2 + 4 * tokens**2 * width)
    text = 12 * (24 * words * width**2 + 4 * words**2 * width)
    assert found.model_flops / 64 == pytest.approx(3 * (image + text), rel=0.05)
    assert found.model_flops < found.flops < 1.5 * found.model_flops
    assert found.fits is None and found.collectives is None
    # Parameters, two moments and the visual encoder's teacher, 4 bytes each; 8 images.
    state = 4 * (3 * found.parameters + 96_000_000)
    assert found.memory.arguments == pytest.approx(state, rel=0.05)


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
        devices.devices_of(chips.machine_of("v5e:4x4"))


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
    monkeypatch.setattr(devices.topologies, "get_topology_desc", refuse)
    with pytest.raises(UserError, match=message) as caught:
        devices.devices_of(chips.machine_of("v5e:3x5"))
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

    memory, fits, collectives = measure.compiled(Lowered(), 2 * chips.GIB, 16 * chips.GIB)
    assert not fits and collectives is None and memory.arguments == 2 * chips.GIB
    if total is None:
        assert memory.total is None and memory.temporaries is None
    else:
        assert memory.total == int(total * chips.GIB)
        assert memory.temporaries == int((total - 2) * chips.GIB)


def test_a_step_that_fits_must_fit_in_what_is_available():
    program = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((2**18,), jnp.float32))
    memory, fits, _ = measure.compiled(program, 0, 2**30)
    assert fits and memory.total >= 2**21 > memory.arguments == 2**20
    assert not measure.compiled(program, 0, memory.total - 1)[1]


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
