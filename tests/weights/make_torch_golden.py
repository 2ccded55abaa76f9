"""Makes torch_zip.pth, torch_stream.pth and torch_values.npz with PyTorch itself.

    pip install torch==2.13.0 omegaconf==2.4.0 yacs==0.1.8 && python make_torch_golden.py

The two files hold one small checkpoint of a made-up training program: weights of every kind that
occurs, in the format of today and in that of PyTorch before 1.6, and beside them settings of
several configuration libraries. The npz holds the weights as PyTorch reads them.
"""

import argparse
import collections
import pathlib
from pathlib import Path

import numpy as np
import torch
import yacs.config
from omegaconf import OmegaConf

HERE = Path(__file__).parent


def weights() -> dict[str, torch.Tensor]:
    """Tensors of many types and layouts; some share their storage."""
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    return {
        "plain.weight": torch.randn(3, 5),
        "parameter": torch.nn.Parameter(torch.randn(4)),
        "frozen": torch.nn.Parameter(torch.randn(2), requires_grad=False),
        "transposed": torch.randn(3, 4).t(),
        "tied": base,
        "row_of_tied": base[2],
        "block_of_tied": base[1:3, 2:5],
        "column_of_tied": base[:, 4],
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded": torch.arange(3.0)[None].expand(2, 3),
        "scalar": torch.tensor(2.659),
        "empty": torch.zeros(0, 3),
        "float64": torch.randn(3, dtype=torch.float64),
        "float16": torch.randn(3).half(),
        "bfloat16": torch.randn(3).bfloat16(),
        "int64": torch.tensor([-(2**40), 7]),
        "int32": torch.tensor([-(2**20), 7], dtype=torch.int32),
        "int16": torch.tensor([-300, 7], dtype=torch.int16),
        "int8": torch.tensor([-100, 7], dtype=torch.int8),
        "uint8": torch.tensor([200, 7], dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "complex64": torch.randn(2, dtype=torch.complex64),
        "num_batches_tracked": torch.tensor(1234),
    }


def checkpoint() -> dict:
    """The weights as a data-parallel model has them, among what else is saved."""
    settings = {"model": {"depth": 12, "name": "vit"}, "list": [1, 2.5, None]}
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    return {
        "epoch": 30,
        "model": collections.OrderedDict((f"module.{k}", v) for k, v in weights().items()),
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=1e-3, out=pathlib.Path("/data/run"), device="cuda"),
        "config": OmegaConf.create(settings),
        "cfg": yacs.config.CfgNode(settings),
        "best": np.float64(53.8),
        "history": np.arange(6, dtype=np.float32).reshape(2, 3),
        "names": {"cat", "dog"},
        "by_class": collections.defaultdict(dict, {0: {"iou": 0.5}}),
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "size": torch.Size([2, 3]),
    }


def main() -> None:
    torch.save(checkpoint(), HERE / "torch_zip.pth")
    torch.save(checkpoint(), HERE / "torch_stream.pth", _use_new_zipfile_serialization=False)
    values = torch.load(HERE / "torch_zip.pth", weights_only=False)["model"]
    values["module.bfloat16"] = values["module.bfloat16"].float()
    arrays = {name.removeprefix("module."): x.detach().numpy() for name, x in values.items()}
    np.savez_compressed(HERE / "torch_values.npz", **arrays)


if __name__ == "__main__":
    main()
