"""What `convert dino` and `convert bert` write is what a run starts from."""

import numpy as np
import pytest
from golden_models import build, file_tensors, read
from safetensors.numpy import save_file

from ovseg_jax import convert
from ovseg_jax.weights.initialize import initial_image, initial_text
from ovseg_jax.weights.pth import write_torch

pytest.importorskip("torch", reason="the extra convert is not installed")


@pytest.mark.parametrize(
    ("kind", "name", "initial"),
    [("dino", "vit", initial_image), ("bert", "bert", initial_text)],
)
def test_a_converted_pickle_starts_a_tower_as_its_safetensors_do(
    tmp_path, tiny_config, kind, name, initial
):
    tensors = file_tensors(read(name))
    _, shapes = build(tiny_config, name)
    save_file(tensors, tmp_path / "direct.safetensors")
    write_torch(tmp_path / "tower.bin", tensors)
    out = tmp_path / "converted"
    assert convert.main([kind, f"--checkpoint={tmp_path / 'tower.bin'}", f"--out={out}"]) == 0
    direct = initial(str(tmp_path / "direct.safetensors"), shapes)
    converted = initial(str(out), shapes)
    assert direct.keys() == converted.keys() and direct
    for path, value in direct.items():
        np.testing.assert_array_equal(converted[path], value, err_msg=path)
