"""What a run measures of itself: rates, step times, memory, FLOPs, files of metrics."""

import struct
import time
from contextlib import closing
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import runs
from jax.sharding import PartitionSpec
from tensorboardX.proto.event_pb2 import Event, SessionLog

from ovseg_jax import sharding
from ovseg_jax.aot import batch_shapes, program_of
from ovseg_jax.errors import UserError
from ovseg_jax.flags import Flag, parse
from ovseg_jax.train.config import load_config
from ovseg_jax.train.metrics import (
    Meter,
    MetricsWriter,
    matmul_flops,
    memory_in_use,
    model_flops,
    peak_flops,
    step_range,
)


class Clock:
    """Time that passes when told."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def batches(self, waits):
        for wait in waits:
            self.now += wait
            yield wait


def test_rates_step_times_and_waiting(monkeypatch):
    clock = Clock(monkeypatch)
    meter = Meter(batch_size=16)
    assert meter.lap() == {}
    meter.peak, meter.flops = 2e12, 4e12
    meter.restart()
    for _ in meter.timed(clock.batches([1.0, 0.0, 0.0, 3.0])):
        clock.now += 1.0
        meter.finish(0.0)
    found = meter.lap()
    assert found["images_per_second"] == pytest.approx(4 * 16 / 8)
    assert found["images_per_second_per_device"] == pytest.approx(1.0)
    assert found["waiting_for_data"] == pytest.approx(0.5)
    assert found["step_seconds_p50"] == pytest.approx(1.5)  # of 2, 1, 1, 4
    assert found["step_seconds_p99"] == pytest.approx(4.0, rel=0.02)
    # Of the peak of all eight devices. CPUs tell no memory.
    assert found["flops_utilization"] == pytest.approx(4 * 4e12 / 8 / (8 * 2e12))
    assert "memory_bytes" not in found
    assert meter.lap() == {}


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", None),
        ("cpu", None),
    ],
)
def test_devices_are_known_by_the_names_that_jax_gives_them(name, peak):
    assert peak_flops(name) == peak


def test_memory_is_that_of_the_fullest_device(monkeypatch):
    assert memory_in_use() == {}  # CPUs tell none
    stats = [
        {"bytes_in_use": 3, "peak_bytes_in_use": 9},
        {"bytes_in_use": 5, "peak_bytes_in_use": 7},
    ]
    devices = [SimpleNamespace(memory_stats=lambda s=each: s) for each in stats]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert memory_in_use() == {"memory_bytes": 5, "memory_peak_bytes": 9}


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


def test_flops_count_what_the_model_needs_and_nothing_twice():
    """Not what rematerialization or accumulation makes again."""
    config = load_config(runs.ROOT / "tests" / "tiny.py:restarts")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])

    def flops(remat="none", micro_batches=1):
        changed = config.copy_and_resolve_references()
        changed.model.image.remat = changed.model.text.remat = remat
        changed.accumulation.micro_batches = micro_batches
        program = program_of(changed, mesh)
        phase = program.phases[0]
        batch = batch_shapes(changed, phase, 16, 16)
        return model_flops(program, phase, batch)

    once = flops()
    assert once > 1e6
    assert flops(remat="full") == flops(micro_batches=2) == once


def test_a_range_of_steps():
    assert step_range("3:7") == (3, 7)
    flag = Flag("profile", step_range)
    for text in ("7", "7:7", "8:7", "a:b", "-1:2"):
        with pytest.raises(UserError, match="--profile"):
            parse([f"--profile={text}"], (flag,))


def events_of(folder):
    """The events of TensorBoard's files, which hold (length, checksum, event, checksum)."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name.rpartition(".")[2]):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("Q", content[:8])
            yield Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


@pytest.mark.slow
def test_tensorboard_holds_what_the_metrics_do(alone):
    found = {}
    for event in events_of(alone.workdir / "tensorboard"):
        for value in event.summary.value:
            found.setdefault(event.step, {"step": event.step})[value.tag] = value.simple_value
    lines = runs.metrics_of(alone.workdir)
    assert list(found) == [line["step"] for line in lines]
    for line in lines:
        assert found[line["step"]] == pytest.approx(line, rel=1e-6)


def test_what_a_run_will_do_again_is_forgotten(tmp_path):
    for step in (0, 7):
        with closing(MetricsWriter(tmp_path, step)) as writer:
            writer.write(step + 1, {"loss": 1.0})
    events = events_of(tmp_path / "tensorboard")
    starts = [event.step for event in events if event.session_log.status == SessionLog.START]
    assert starts == [1, 8]


def test_metrics_on_a_full_disk_are_one_error(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    writer = MetricsWriter(tmp_path)
    with pytest.raises(UserError, match="metrics.jsonl cannot be written: No space left"):
        writer.write(1, {"loss": 1.0})
    writer.close()  # without what did not fit
