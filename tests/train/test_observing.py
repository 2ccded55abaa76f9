"""What a run tells about itself: rates, step times, FLOPs, traces, changes of its config."""

import os
import shutil
import struct
import time
from contextlib import closing
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import runs
from data.benchmarks import miniatures
from reference.batches import make_batch
from tensorboardX.proto.event_pb2 import Event, SessionLog

from ovseg_jax import sharding
from ovseg_jax.errors import RestartError, UserError
from ovseg_jax.flags import Flag, load_config, parse
from ovseg_jax.models.build import build_model
from ovseg_jax.train.chips import peak_flops
from ovseg_jax.train.claim import claimed
from ovseg_jax.train.config_changes import changed_fields, plain
from ovseg_jax.train.evaluations import images_to_choose_on
from ovseg_jax.train.loop import _Training, check_best_starts, check_loop_config, step_flops
from ovseg_jax.train.meter import Meter, memory_in_use
from ovseg_jax.train.phases import make_phases
from ovseg_jax.train.profiling import step_range
from ovseg_jax.train.program import Program, boxed_params
from ovseg_jax.train.report import MetricsWriter
from ovseg_jax.train.text_cuts import TextCuts

GIB = 2**30


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
    meter.restart()
    for _ in meter.timed(clock.batches([1.0, 0.0, 0.0, 3.0])):
        clock.now += 1.0
        meter.stepped()
    found = meter.lap()
    assert found["images_per_second"] == pytest.approx(4 * 16 / 8)
    assert found["images_per_second_per_device"] == pytest.approx(1.0)
    assert found["waiting_for_data"] == pytest.approx(0.5)
    assert found["step_seconds_p50"] == pytest.approx(1.5)  # of 2, 1, 1, 4
    assert found["step_seconds_p99"] == pytest.approx(4.0, rel=0.02)
    # CPUs have no peak to compare with and tell no memory.
    assert not {"flops_utilization", "memory_bytes"} & found.keys()
    assert meter.lap() == {}


def test_utilization_is_the_share_of_the_peak_of_all_devices(monkeypatch):
    clock = Clock(monkeypatch)
    monkeypatch.setattr("ovseg_jax.train.meter.peak_flops", lambda kind: 2e12)
    meter = Meter(batch_size=8)
    meter.count_flops(4e12)
    clock.now += 0.5
    meter.stepped()
    assert meter.lap()["flops_utilization"] == pytest.approx(4e12 / 0.5 / (8 * 2e12))


def test_devices_are_known_by_the_names_that_jax_gives_them():
    assert peak_flops("TPU v5 lite") == peak_flops("TPU v5e") == 197e12
    assert peak_flops("TPU v5p") == peak_flops("TPU v5") == 459e12
    assert peak_flops("TPU v6 lite") == 918e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") is None
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("cpu") is None


def test_memory_is_that_of_the_fullest_device(monkeypatch):
    class Device:
        def __init__(self, used, peak):
            self.stats = {"bytes_in_use": used * GIB, "peak_bytes_in_use": peak * GIB}

        def memory_stats(self):
            return self.stats

    assert memory_in_use() == {}  # CPUs tell none
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(3, 9), Device(5, 7)])
    assert memory_in_use() == {"memory_bytes": 5 * GIB, "memory_peak_bytes": 9 * GIB}


def test_flops_count_what_the_model_needs_and_nothing_twice(tmp_path, monkeypatch):
    """Not what rematerialization or accumulation makes again."""
    monkeypatch.chdir(runs.ROOT)
    config = load_config("tests/tiny.py:restarts")
    config.data.text_length = 16
    phases = make_phases(config, 100)

    def flops(**changes):
        changed = config.copy_and_resolve_references()
        changed.model.image.remat = changed.model.text.remat = changes.get("remat", "none")
        changed.accumulation.micro_batches = changes.get("micro_batches", 1)
        model = build_model(changed.model)
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        layout = sharding.parameter_shardings(boxed_params(model), mesh)
        program = Program(changed, mesh, model, phases, layout)
        batch = {
            name: jax.ShapeDtypeStruct(value.shape, value.dtype)
            for name, value in make_batch(0, second=False).items()
        }
        batch["image"] = jax.ShapeDtypeStruct((16, 28, 28, 3), np.uint8)
        return step_flops(program, phases[0], batch)

    assert flops() is None  # CPUs have no peak to compare with
    monkeypatch.setattr("ovseg_jax.train.loop.peak_flops", lambda kind: 1e12)
    once = flops()
    assert once > 1e6
    assert flops(remat="full") == flops(micro_batches=2) == once


def test_a_range_of_steps():
    assert step_range("3:7") == (3, 7)
    flag = Flag("profile", step_range)
    for text in ("7", "7:7", "8:7", "a:b", "-1:2"):
        with pytest.raises(UserError, match="--profile"):
            parse([f"--profile={text}"], (flag,))


@pytest.mark.parametrize(
    ("key", "value"),
    [("log_every", 0), ("checkpoint_every", -1), ("max_skipped", 0), ("hang_seconds", -1.0)],
)
def test_numbers_of_steps_and_seconds(key, value):
    config = load_config(runs.ROOT / "tests" / "tiny.py")
    check_loop_config(config)
    config[key] = value
    with pytest.raises(UserError, match=f"config.{key} is {value}; it must be at least"):
        check_loop_config(config)


def test_evaluations_that_are_missing():
    config = load_config(runs.ROOT / "tests" / "tiny.py:restarts")
    config.eval.every = 5
    with pytest.raises(UserError, match="config.eval.every needs a benchmark"):
        check_loop_config(config)
    config.eval.benchmarks = ("voc_zss", "scenes")
    with pytest.raises(UserError, match="benchmark voc_zss has none"):
        check_loop_config(config)
    config.eval.benchmarks = ("scenes",)
    check_loop_config(config)
    config.eval.calibrate = False
    with pytest.raises(UserError, match=r"set config.eval.calibrate = True"):
        check_loop_config(config)
    config.eval.weights = "none"
    with pytest.raises(UserError, match=r"config.eval.weights is 'none'"):
        check_loop_config(config)


@pytest.mark.parametrize("every", [0, 21])
def test_a_best_state_must_come_before_the_phase_that_starts_from_it(every):
    config = load_config(runs.ROOT / "tests" / "tiny.py:restarts")
    config.phases[1]["start_from"] = "best"
    check_best_starts(make_phases(config, 100), every=20)
    with pytest.raises(UserError, match=r"config.phases\[1\].start_from is 'best', but no"):
        check_best_starts(make_phases(config, 100), every)


def test_the_released_recipe_says_what_it_chooses_on(tmp_path):
    config = load_config(runs.ROOT / "configs" / "vitb_released.py")
    with pytest.raises(UserError, match="config.eval.voc.dir"):
        check_loop_config(config)
    miniatures.voc(tmp_path)
    base = tmp_path / "VOCdevkit" / "VOC2012"
    config.eval.voc.dir = str(tmp_path)
    with pytest.raises(UserError, match="Segmentation/train.txt"):
        check_loop_config(config)
    miniatures.write_text(base / "ImageSets" / "Segmentation" / "train.txt", "2008_000001")
    mask = miniatures.values_of([0, 1, 255])
    miniatures.write_mask(base / "SegmentationClass" / "2008_000001.png", mask, palette=True)
    check_loop_config(config)
    assert len(images_to_choose_on(config.eval)) == 1


def test_changes_are_listed_by_field(tiny_config):
    before = plain(tiny_config)
    tiny_config.optimizer.learning_rate.peak = 2e-3
    tiny_config.model.image.grid = (2, 2)
    tiny_config.extra = "new"
    assert changed_fields(before, plain(tiny_config)) == [
        'config.extra: absent -> "new"',
        "config.model.image.grid: [4, 4] -> [2, 2]",
        "config.optimizer.learning_rate.peak: 0.001 -> 0.002",
    ]
    phases = [{"steps": 3}, {"steps": 4}], [{"steps": 3}, {"steps": 5}, {"steps": 6}]
    assert changed_fields(*phases, "phases") == [
        "phases[1].steps: 4 -> 5",
        'phases[2]: absent -> {"steps": 6}',
    ]


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


def test_tensorboard_forgets_what_a_run_will_do_again(tmp_path):
    for step in (0, 7):
        with closing(MetricsWriter(tmp_path, step)) as writer:
            writer.write(step + 1, {"loss": 1.0})
    starts = [
        event.step
        for event in events_of(tmp_path / "tensorboard")
        if event.session_log.status == SessionLog.START
    ]
    assert starts == [1, 8]


def test_metrics_on_a_full_disk_are_one_error(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    writer = MetricsWriter(tmp_path)
    with pytest.raises(UserError, match="metrics.jsonl cannot be written: No space left"):
        writer.write(1, {"loss": 1.0})
    writer.close()  # without what did not fit


def test_a_work_directory_is_for_one_job_at_a_time(tmp_path):
    with claimed(tmp_path / "run"):
        with pytest.raises(RestartError, match=f"another job .*run .process {os.getpid()} on"):
            with claimed(tmp_path / "run"):
                pass
    with claimed(tmp_path / "run"):
        pass
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match="file/run cannot be written"):
        with claimed(tmp_path / "file" / "run"):
            pass


@pytest.mark.slow
def test_a_profile_is_a_trace_and_metrics_have_their_phase(alone):
    assert f"trace: {alone.workdir / 'profile'}" in alone.said
    traces = list((alone.workdir / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 1000
    lines = runs.metrics_of(alone.workdir)
    half = runs.STEPS // 2
    assert [line["train/phase"] for line in lines] == [0.0] * half + [1.0] * half
    for line in lines:
        for name in ("contrastive", "entity", "temperature", "group_usage", "learning_rate"):
            assert f"train/{name}" in line
        # The first step of a phase is compiled in, and tells no speed.
        assert ("train/images_per_second" in line) == (line["step"] not in (1, half + 1))
        if "train/images_per_second" in line:
            quick, usual, slow = (line[f"train/step_seconds_p{name}"] for name in (50, 90, 99))
            assert 0 < quick <= usual <= slow
            assert 0 <= line["train/waiting_for_data"] <= 1


CHANGES = {
    "a field without consequences for shapes": (
        ["--config.optimizer.learning_rate.peak=0.001"],
        0,
        ["config.optimizer.learning_rate.peak: 0.0015 -> 0.001", "resuming at step 40"],
    ),
    "another width": (
        ["--config.model.joint_width=8"],
        2,
        ["does not fit this config", "config.model.joint_width: 16 -> 8"],
    ),
    "a step in another phase": (
        ["--config.phases[0].steps=50"],
        2,
        ["config.phases[1], which takes steps 50 to 70", "config.phases[0].steps: 20 -> 50"],
    ),
    "a profile of no step": (["--profile=3:5"], 2, ["--profile=3:5 begins at no step"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_config_is_shown_and_refused_where_it_cannot_go_on(alone, tmp_path, name):
    workdir = shutil.copytree(alone.workdir, tmp_path / "run")
    arguments, code, expected = CHANGES[name]
    before = (workdir / "config.json").read_text()
    said = runs.train(workdir, *arguments, code=code)
    for words in expected:
        assert words in said
    # A refused config does not take the place of the one that the checkpoints belong to.
    assert ((workdir / "config.json").read_text() == before) == (code != 0)


def test_targets_that_are_positive_nearly_everywhere_are_warned_of_once():
    config = load_config(runs.ROOT / "tests" / "tiny.py:restarts")
    said, written = [], []
    progress = SimpleNamespace(say=said.append, update=lambda text, final: None)
    training = SimpleNamespace(
        warned=False,
        run=SimpleNamespace(progress=progress, config=config),
        checkpoints=SimpleNamespace(check=lambda: None),
        writer=SimpleNamespace(write=lambda step, values: written.append(values)),
    )
    phase = make_phases(config, 100)[1]
    for step, fraction in enumerate((0.59, 0.72, 0.9), start=21):
        metrics = {"loss": 1.0, "skipped": 0.0, "mask_target_fraction": fraction}
        arrays = {name: jax.numpy.float32(value) for name, value in metrics.items()}
        _Training._log(training, phase, step, arrays, Meter(8), TextCuts(), 0)
    assert len(said) == 1 and "step 22: 72 % of the patches are positive" in said[0]
    fractions = [values["train/mask_target_fraction"] for values in written]
    assert fractions == pytest.approx([0.59, 0.72, 0.9])
