"""PyTorch's files: what PyTorch wrote is read exactly, what would run code is refused."""

import collections
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovseg_jax.errors import UserError
from ovseg_jax.weights.pth import read_checkpoint, read_state_dict, write_torch

torch = pytest.importorskip("torch", reason="the extra convert is not installed")

HERE = Path(__file__).parent
FORMATS = ("zip", "stream")
VALUES = dict(np.load(HERE / "torch_values.npz"))


def golden(kind):
    return HERE / f"torch_{kind}.pth"


def same(ours, wanted):
    assert ours.shape == wanted.shape
    np.testing.assert_array_equal(np.asarray(ours, wanted.dtype), wanted)


@pytest.mark.parametrize("kind", FORMATS)
def test_reads_what_pytorch_wrote(kind):
    """Tensors of every type and layout, beside settings of several configuration libraries."""
    read = read_state_dict(golden(kind))
    assert read.entry == "model" and read.left_out == ()
    assert set(read.tensors) == set(VALUES)  # without "module."
    for name, wanted in VALUES.items():
        same(read.tensors[name], wanted)
        kept = wanted.dtype if name != "bfloat16" else np.dtype(ml_dtypes.bfloat16)
        assert read.tensors[name].dtype == kept, name


def test_tensors_are_views_of_the_file():
    read = read_state_dict(golden("zip")).tensors
    assert np.shares_memory(read["tied"], read["block_of_tied"])
    assert not read["plain.weight"].flags.owndata


# ---- writing


WRITTEN = {
    "a.weight": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32),
    "logit_scale": np.full((), 2.659, np.float32),
    "num_batches_tracked": np.array(1 << 40),
    "none": np.zeros((0, 3), np.float32),
    "half": np.array([1.5, -2], ml_dtypes.bfloat16),
    "big_endian": np.arange(3, dtype=">f4"),
    "flags": np.array([True, False]),
}


def test_a_written_file_says_the_same_to_pytorch_and_to_us(tmp_path):
    path = tmp_path / "out.pth"
    write_torch(path, WRITTEN)
    theirs, ours = torch.load(path, weights_only=True), read_state_dict(path)
    assert list(theirs) == list(ours.tensors) == list(WRITTEN) and ours.entry == ""
    for name, wanted in WRITTEN.items():
        same(theirs[name].double().numpy(), wanted.astype(np.float64))
        same(ours.tensors[name], wanted)
        assert ours.tensors[name].dtype == wanted.dtype.newbyteorder("=")

    # Equal weights give equal files.
    write_torch(tmp_path / "other.pth", WRITTEN)
    assert (tmp_path / "other.pth").read_bytes() == path.read_bytes()
    with pytest.raises(UserError, match="words has the type <U3"):
        write_torch(tmp_path / "x.pth", {"words": np.array(["cat"])})


def test_without_pytorch_one_line_says_what_to_install(monkeypatch, tmp_path):
    setup = (HERE.parents[1] / "setup.cfg").read_text()
    (wanted,) = {line.strip() for line in setup.splitlines() if line.strip().startswith("torch=")}
    monkeypatch.setitem(sys.modules, "torch", None)
    for use in (lambda: read_state_dict(golden("zip")), lambda: write_torch(tmp_path / "x", {})):
        with pytest.raises(UserError, match=f"pip install {wanted} ") as error:
            use()
        assert "\n" not in str(error.value)


# ---- refusals


def archive_of(path, pickled, entries=(), **options):
    """A zip file in PyTorch's manner around a pickle."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("x/data.pkl", pickled)
        for name, content in dict(entries).items():
            archive.writestr(f"x/{name}", content)
    return path


class Evil:
    """Pickles to a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


CALLS = {
    "posix.system": Evil(os.system, "touch ran"),
    "eval": Evil(eval, "open('ran', 'w')"),
    "getattr": Evil(getattr, "text", "upper"),
    "subprocess.Popen": b"csubprocess\nPopen\n(S'touch ran'\ntR.",
    "torch.load": b"ctorch\nload\n(X\x09\x00\x00\x00other.ptht\x52.",
    "numpy.load": b"cnumpy\nload\n(X\x09\x00\x00\x00other.npyt\x52.",
    "pytorch_lightning.callbacks.Checkpoint": b"cpytorch_lightning.callbacks\nCheckpoint\n.",
    # names that are read as values, and so must not be called or changed
    "is not callable": b"ctorch\nfloat32\n(K\x01tR.",
    "Can only build": b"c__builtin__\nset\n}X\x03\x00\x00\x00popK\x01sb.",
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", FORMATS)
def test_code_is_refused_by_name(name, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call = CALLS[name]
    body = call if isinstance(call, bytes) else pickle.dumps({"model": call}, 2)
    path = tmp_path / "evil.pth"
    if kind == "zip":
        archive_of(path, body, {"version": b"3\n", "byteorder": b"little"})
    else:
        begin = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
        path.write_bytes(b"".join(pickle.dumps(x, 2) for x in begin) + body + pickle.dumps([], 2))
    with pytest.raises(UserError, match=f"refused.*{name}") as error:
        read_state_dict(path)
    assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()


def test_what_is_no_plain_state_dict_is_refused(tmp_path):
    """A small file with large arrays, packed entries, sparse tensors, settings alone."""
    path = tmp_path / "x.pth"
    cases = {
        "far more than": {"w": torch.ones(1).expand(60_000, 60_000)},
        "w is no plain array of numbers": {"w": torch.eye(3).to_sparse()},
        "holds no state dict; it has: epoch, args": dict(epoch=3, args={"lr": 1}),
        "holds no state dict": 3,
    }
    for reason, content in cases.items():
        torch.save(content, path)
        with pytest.raises(UserError, match=reason):
            read_state_dict(path)
    archive_of(path, b"N.", {"data/0": b"\0" * 100_000_000}, compression=8)
    with pytest.raises(UserError, match="is a compressed archive"):
        read_state_dict(path)


FILES = {
    "empty": b"",
    "garbage": b"\x80\x02garbage",
    "page": b"<!DOCTYPE html><html>Not found</html>",
    "safetensors": struct.pack("<Q", 20) + b'{"w":{"dtype":"F32"}}',
    "cut": b"PK\x03\x04" + b"\0" * 100,
    "pickle": pickle.dumps({"a": 1}, 2),
    "tar": b"\0" * 257 + b"ustar" + b"\0" * 300,
}


def test_files_of_other_kinds(tmp_path):
    for kind, content in FILES.items():
        (tmp_path / kind).write_bytes(content)
    with (tmp_path / "npz").open("wb") as file:
        np.savez(file, w=np.zeros(3))
    archive_of(tmp_path / "script", b"N.", {"constants.pkl": b"N.", "version": b"3\n"})
    for path in tmp_path.iterdir():
        with pytest.raises(UserError, match="no PyTorch file") as error:
            read_state_dict(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", FORMATS)
@given(data=st.data())
def test_damage_is_an_error_or_leaves_the_tensors_readable(kind, data, tmp_path_factory):
    whole = golden(kind).read_bytes()
    at = data.draw(st.integers(1, len(whole) - 1))
    if data.draw(st.booleans()):
        changed = whole[:at]
    else:
        byte = data.draw(st.integers(1, 255))
        changed = whole[:at] + bytes([whole[at] ^ byte]) + whole[at + 1 :]
    path = tmp_path_factory.mktemp("damage") / "x.pth"
    path.write_bytes(changed)
    try:
        read = read_state_dict(path)
    except UserError as error:
        assert str(path) in str(error)
    else:
        for name, array in read.tensors.items():
            if kind == "zip" and name in VALUES:  # checksums cover every tensor
                same(array, VALUES[name])


# ---- where the state dict is


@pytest.mark.parametrize("entry", ["", "model", "state_dict", "teacher", "model.module"])
def test_entries_and_prefixes(entry, tmp_path):
    weights = {f"module._orig_mod.{name}": value for name, value in WRITTEN.items()}
    path = tmp_path / "x.pth"
    write_torch(path, weights)
    state = torch.load(path, weights_only=True)
    for name in reversed(entry.split(".") if entry else []):
        state = {name: state}
    torch.save(state, path)
    read = read_state_dict(path)
    assert read.entry == entry and set(read.tensors) == set(WRITTEN)
    if entry:
        assert set(read_state_dict(path, entry).tensors) == set(WRITTEN)
        with pytest.raises(UserError, match=f"no entry 'other'; it has: {entry.split('.')[0]}"):
            read_state_dict(path, "other")


def test_a_counter_beside_the_weights_is_read(tmp_path):
    """PyTorch's MultiStepLR saves its milestones so."""
    scheduler = {"milestones": collections.Counter([30, 60, 60]), "last_epoch": 3}
    path = tmp_path / "x.pth"
    torch.save({"model": {"w": torch.ones(2)}, "lr_scheduler": scheduler}, path)
    assert read_state_dict(path).tensors["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", ["x.pth.tar", "x.PTH", "x", "epoch_3.best", "x.NPZ"])
def test_the_name_does_not_matter(name, tmp_path):
    path = tmp_path / name
    if name.endswith("NPZ"):
        with path.open("wb") as file:
            np.savez(file, w=np.ones(2))
    else:
        write_torch(path, {"w": np.ones(2)})
    assert read_checkpoint(path).tensors["w"].tolist() == [1.0, 1.0]
