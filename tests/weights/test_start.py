"""What a run says about where its parameters start."""

import json

import numpy as np
import pytest
from golden_models import build, file_tensors, read
from safetensors.numpy import save_file

from ovseg_jax.flags import load_config
from ovseg_jax.train.report import Progress
from ovseg_jax.train.run import make_run
from ovseg_jax.weights.initialize import published_start


def folder(path, name, config):
    path.mkdir()
    save_file(file_tensors(read(name)), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


@pytest.fixture
def specs(tmp_path):
    """A DINOv3 and a BERT with their Hugging Face configs."""
    image = {"model_type": "dinov3_vit", "num_attention_heads": 3, "layer_norm_eps": 1e-3}
    image |= {"rope_parameters": {"rope_theta": 100.0}, "hidden_act": "gelu"}
    text = {"model_type": "bert", "num_attention_heads": 3, "layer_norm_eps": 1e-3}
    text |= {"pad_token_id": 1, "hidden_act": "gelu"}
    return {
        "image_init": folder(tmp_path / "dinov3", "dinov3", image),
        "text_init": folder(tmp_path / "bert", "bert", text),
        "resample_init": False,
        "neck_init": "",
    }


def test_the_table_counts_everything_once(tiny_config, specs):
    build(tiny_config, "dinov3")
    _, shapes = build(tiny_config, "bert")
    tiny_config.model.pad_id = 1
    tiny_config.model.update(specs)
    start = published_start(tiny_config.model, shapes)
    head, *rows = start.rows
    assert head == ("parameters", "tensors", "numbers", "start from")
    assert sum(int(row[1]) for row in rows) == len(shapes)
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    assert sum(int(row[2].replace(",", "")) for row in rows) == total
    table = {row[0]: row[3] for row in rows}
    assert len(table) == len(rows)
    assert table["text_encoder"] == specs["text_init"]
    assert table["image_encoder/trunk_layers"] == specs["image_init"]
    assert table["image_encoder/register_tokens"] == specs["image_init"]
    assert table["image_encoder/binding"] == table["image_projector"] == "random"
    assert start.remarks == []
    assert set(start.values) == {
        path for path in shapes if path.split("/")[0] == "text_encoder"
    } | {
        path
        for path in shapes
        if path.startswith("image_encoder/")
        and path.split("/")[1]
        in ("patch_embed", "class_token", "register_tokens", "trunk_layers", "trunk_end")
    }


def test_what_weights_cannot_tell_is_compared_with_their_config(tiny_config, specs):
    build(tiny_config, "dinov3", trunk_heads=2, eps=1e-5, rope_theta=50.0)
    _, shapes = build(tiny_config, "bert", eps=1e-12)
    tiny_config.model.pad_id = 0
    tiny_config.model.update(specs)
    start = published_start(tiny_config.model, shapes)
    said = "\n".join(start.remarks)
    for part in (
        "num_attention_heads = 3, config.model.image.trunk_heads is 2",
        "layer_norm_eps = 0.001, config.model.image.eps is 1e-05",
        "rope_theta = 100.0, config.model.image.rope_theta is 50.0",
        "layer_norm_eps = 0.001, config.model.text.eps is 1e-12",
        "pad_token_id = 1, config.model.pad_id is 0",
    ):
        assert part in said, part
    assert len(start.remarks) == 5


def test_a_run_prints_the_table_and_starts_from_the_weights(tmp_path, capsys):
    config = load_config("tests/tiny.py")
    text = {"vocab_size": 30522, "width": 24, "depth": 2, "heads": 3, "mlp_width": 40}
    config.model.text.update(**text, max_positions=40)
    tensors = file_tensors(read("bert"))
    rng = np.random.default_rng(0)
    for name, rows in (("word", 30522), ("position", 40)):
        table = rng.normal(size=(rows, 24)).astype(np.float32)
        tensors[f"embeddings.{name}_embeddings.weight"] = table
    save_file(tensors, tmp_path / "model.safetensors")
    config.model.text_init = str(tmp_path)
    run = make_run(config, Progress())
    params = run.initial_params()
    np.testing.assert_array_equal(params["text_encoder"]["position"], table)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[-1] for line in lines if line.startswith("text_encoder")] == [
        str(tmp_path)
    ]
    assert [line.split()[-1] for line in lines if line.startswith("image_encoder")] == ["random"]
