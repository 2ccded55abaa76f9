"""PyTorch's files: what torch 2.13.0 wrote is read exactly, what would run code is refused."""

import collections
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovseg_jax.errors import UserError
from ovseg_jax.weights.state_dict import read_state_dict
from ovseg_jax.weights.torch_file import open_torch
from ovseg_jax.weights.torch_writer import ALIGNMENT, write_torch

HERE = Path(__file__).parent
FORMATS = ("zip", "stream")
VALUES = dict(np.load(HERE / "torch_values.npz"))


def golden(kind):
    return HERE / f"torch_{kind}.pth"


def same(found, wanted):
    assert found.shape == wanted.shape
    np.testing.assert_array_equal(np.asarray(found, wanted.dtype), wanted)


@pytest.mark.parametrize("kind", FORMATS)
def test_reads_what_pytorch_wrote(kind):
    read = read_state_dict(golden(kind))
    assert read.entry == "model" and read.left_out == ()
    assert set(read.tensors) == set(VALUES)  # "module." is gone
    for name, wanted in VALUES.items():
        same(read.tensors[name], wanted)
        kept = wanted.dtype if name != "bfloat16" else np.dtype(ml_dtypes.bfloat16)
        assert read.tensors[name].dtype == kept, name


@pytest.mark.parametrize("kind", FORMATS)
def test_what_stands_beside_the_weights_is_inert(kind):
    value = open_torch(golden(kind)).value
    assert repr(value["args"]) == "<argparse.Namespace>"
    assert repr(value["config"]) == "<omegaconf.dictconfig.DictConfig>"
    assert repr(value["cfg"]) == "<yacs.config.CfgNode>"
    assert value["best"].array == 53.8 and value["epoch"] == 30
    np.testing.assert_array_equal(value["history"].array, np.arange(6.0).reshape(2, 3))
    assert value["names"] == {"cat", "dog"} and value["by_class"] == {0: {"iou": 0.5}}


def test_tensors_are_views_of_the_file():
    read = read_state_dict(golden("zip")).tensors
    assert np.shares_memory(read["tied"], read["block_of_tied"])
    assert not read["plain.weight"].flags.owndata and not read["plain.weight"].flags.writeable


# ---- writing


class _Reference(pickle.Unpickler):
    """What PyTorch does with its pickle, with NumPy for tensors: `data` are the entries."""

    def __init__(self, data):
        super().__init__(io.BytesIO(data["data.pkl"]))
        self.data = data

    def find_class(self, module, name):
        kinds = {"FloatStorage": "<f4", "LongStorage": "<i8", "BoolStorage": "?"}
        kinds["BFloat16Storage"] = ml_dtypes.bfloat16
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.tensor
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        return {("torch", key): np.dtype(kind) for key, kind in kinds.items()}[module, name]

    def persistent_load(self, identity):
        word, dtype, key, device, count = identity
        assert (word, device) == ("storage", "cpu")
        return np.frombuffer(self.data[f"data/{key}"], dtype, count)

    @staticmethod
    def tensor(storage, offset, shape, strides, gradient, hooks):
        assert gradient is False and hooks == collections.OrderedDict()
        bytes_ = [step * storage.itemsize for step in strides]
        return np.lib.stride_tricks.as_strided(storage[offset:], shape, bytes_)


def written():
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.normal(size=(3, 4)).astype(np.float32),
        "a.transposed": rng.normal(size=(3, 4, 2)).astype(np.float32).T,
        "logit_scale": np.float32(2.659) * np.ones((), np.float32),
        "num_batches_tracked": np.array(1 << 40),
        "none": np.zeros((0, 3), np.float32),
        "half": np.array([1.5, -2], ml_dtypes.bfloat16),
        "big_endian": np.arange(3, dtype=">f4"),
        "flags": np.array([True, False]),
    }


@pytest.mark.parametrize("entry", ["", "model"])
def test_written_file_says_the_same_in_the_way_of_pytorch(entry, tmp_path):
    path = tmp_path / "out.pth"
    write_torch(path, written(), entry)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        data = {name.removeprefix("archive/"): archive.read(name) for name in archive.namelist()}
        for info in archive.infolist():
            extra = int.from_bytes(path.read_bytes()[info.header_offset + 28 :][:2], "little")
            start = info.header_offset + 30 + len(info.filename) + extra
            assert start % ALIGNMENT == 0 and info.compress_type == zipfile.ZIP_STORED
    assert data["version"] == b"3\n" and data["byteorder"] == b"little"
    value = _Reference(data).load()
    value = value[entry] if entry else value
    assert type(value) is collections.OrderedDict and list(value) == list(written())
    own = read_state_dict(path)
    assert own.entry == entry
    for name, wanted in written().items():
        same(value[name], wanted)
        same(own.tensors[name], wanted)
        assert own.tensors[name].dtype == wanted.dtype.newbyteorder("=")


def test_equal_weights_give_equal_files_and_nothing_is_left_behind(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_torch(tmp_path / folder / "x.pth", written())
    assert (tmp_path / "a" / "x.pth").read_bytes() == (tmp_path / "b" / "x.pth").read_bytes()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x.pth"]


def test_types_that_pytorch_has_not(tmp_path):
    with pytest.raises(UserError, match="words has the type <U3"):
        write_torch(tmp_path / "x.pth", {"words": np.array(["cat"])})
    with pytest.raises(UserError, match="cannot be written"):
        write_torch(tmp_path / "no" / "x.pth", written())


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
    "builtins.eval": Evil(eval, "open('ran', 'w')"),
    "builtins.getattr": Evil(getattr, "text", "upper"),
    "subprocess.Popen": b"csubprocess\nPopen\n(S'touch ran'\ntR.",
    "torch.load": b"ctorch\nload\n(S'other.pth'\ntR.",
    "numpy.load": b"cnumpy\nload\n(S'other.npy'\ntR.",
    "pytorch_lightning.callbacks.Checkpoint": b"cpytorch_lightning.callbacks\nCheckpoint\n.",
    "os.environ": b"\x80\x04\x8c\x02os\x8c\x07environ\x93.",
    # a name that is read as a value, not as a function
    "it calls numpy.float64": b"cnumpy\nfloat64\n(K\x01tR.",
    "it calls <class 'dict'>": b"}(K\x01tR.",
    "EXT1": b"\x82\x01.",
    "outside of it": b"\x80\x02S'x'\nQ.",
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", FORMATS)
def test_code_is_refused_by_name(name, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call = CALLS[name]
    body = call if isinstance(call, bytes) else pickle.dumps({"model": call}, 2)
    path = tmp_path / "evil.pth"
    if kind == "zip":
        archive_of(path, body)
    else:
        begin = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
        path.write_bytes(b"".join(pickle.dumps(x, 2) for x in begin) + body + pickle.dumps([], 2))
    wanted = "refused.*" + ("no storage" if name == "outside of it" else name)
    with pytest.raises(UserError, match=wanted):
        open_torch(path)
    assert not (tmp_path / "ran").exists()


def test_names_cannot_be_changed_by_what_is_read(tmp_path):
    # BUILD sets attributes on whatever stands on the stack, a function or a class included.
    body = b"ctorch._utils\n_rebuild_tensor_v2\n}S'make'\nN}S'make'\nNs\x86b."
    archive_of(tmp_path / "x.pth", body)
    before = read_state_dict(golden("zip")).tensors["tied"].copy()
    open_torch(tmp_path / "x.pth")
    same(read_state_dict(golden("zip")).tensors["tied"], before)


def tensor_pickle(count=4, offset=0, shape=(2, 2), strides=(2, 1), key="0"):
    def number(value):
        return b"J" + struct.pack("<i", value)

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0%bX\x03\0\0\0cpu%btQ" % (
        key.encode(),
        number(count),
    )
    return (
        b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + number(offset)
        + numbers(shape)
        + numbers(strides)
        + b"\x89}tRs."
    )


DATA = np.arange(4, dtype="<f4").tobytes()


def test_the_tensor_of_these_tests_is_read_where_nothing_is_wrong(tmp_path):
    archive_of(tmp_path / "x.pth", tensor_pickle(), {"data/0": DATA})
    same(read_state_dict(tmp_path / "x.pth").tensors["w"], np.arange(4, dtype="f4").reshape(2, 2))


BAD_TENSORS = {
    "needs 20 bytes": ({"offset": 1}, {"data/0": DATA}),
    "holds 12": ({}, {"data/0": DATA[:12]}),
    "far more than": (
        {"count": 1, "shape": (60_000, 60_000), "strides": (0, 0)},
        {"data/0": DATA},
    ),
    "entry data/0 is missing": ({}, {}),
    "damaged": ({"strides": (2, -1)}, {"data/0": DATA}),
    "strides": ({"strides": (1,)}, {"data/0": DATA}),
    "no storage": ({"count": -4}, {"data/0": DATA}),
    "byte order": ({}, {"data/0": DATA, "byteorder": "middle"}),
}


@pytest.mark.parametrize("reason", BAD_TENSORS)
def test_a_tensor_that_does_not_lie_in_the_file(reason, tmp_path):
    changes, entries = BAD_TENSORS[reason]
    path = archive_of(tmp_path / "x.pth", tensor_pickle(**changes), entries)
    with pytest.raises(UserError, match=reason):
        read_state_dict(path)


def test_a_view_of_a_storage_in_an_old_stream(tmp_path):
    begin = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    view = b"X\x01\0\0\0vK\x01K\x02\x87tQ"  # the storage's elements 1 and 2
    body = tensor_pickle(shape=(2,), strides=(1,)).replace(b"tQ", view, 1)
    parts = [*(pickle.dumps(x, 2) for x in begin), body, pickle.dumps(["0"], 2)]
    path = tmp_path / "x.pth"
    path.write_bytes(b"".join(parts) + struct.pack("<q", 4) + DATA)
    same(read_state_dict(path).tensors["w"], np.array([1, 2], np.float32))
    path.write_bytes(b"".join(parts) + struct.pack("<q", 4) + DATA[:-1])
    with pytest.raises(UserError, match="ends within storage '0'"):
        read_state_dict(path)


def test_the_other_byte_order(tmp_path):
    entries = {"data/0": np.arange(4, dtype=">f4").tobytes(), "byteorder": "big"}
    path = archive_of(tmp_path / "x.pth", tensor_pickle(), entries)
    same(read_state_dict(path).tensors["w"], np.arange(4, dtype="f4").reshape(2, 2))


def test_compressed_entries_are_not_unpacked(tmp_path):
    entries = {"data/0": b"\0" * 100_000_000}
    path = archive_of(tmp_path / "x.pth", tensor_pickle(), entries, compression=8)
    assert path.stat().st_size < 200_000
    with pytest.raises(UserError, match="is compressed or encrypted"):
        read_state_dict(path)


FILES = {
    "is empty": b"",
    "cannot be read: No such file": None,
    "truncated download": b"\x80\x02garbage",
    "is a plain pickle.*truncated": b"\x80",
    "like a web page": b"<!DOCTYPE html><html>Not found</html>",
    "looks like safetensors": struct.pack("<Q", 20) + b'{"w":{"dtype":"F32"}}',
    "is missing or wrong": b"PK\x03\x04" + b"\0" * 100,
    "is a plain pickle": pickle.dumps({"a": 1}, 2),
    "tar archive": b"\0" * 257 + b"ustar" + b"\0" * 300,
}


@pytest.mark.parametrize("reason", FILES)
def test_files_of_other_kinds(reason, tmp_path):
    path = tmp_path / "x.pth"
    if FILES[reason] is not None:
        path.write_bytes(FILES[reason])
    with pytest.raises(UserError, match=reason):
        open_torch(path)


def test_archives_of_other_kinds(tmp_path):
    with zipfile.ZipFile(tmp_path / "weights.npz", "w") as archive:
        archive.writestr("x/w.npy", b"")
    with pytest.raises(UserError, match=r"data\.pkl is missing"):
        open_torch(tmp_path / "weights.npz")
    archive_of(tmp_path / "script.pt", b"N.", {"constants.pkl": b"N."})
    with pytest.raises(UserError, match="TorchScript"):
        open_torch(tmp_path / "script.pt")


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
        for array in read.tensors.values():
            array.sum()


# ---- where the state dict stands


@pytest.mark.parametrize("entry", ["", "model", "state_dict", "teacher", "model.module"])
def test_entries_and_prefixes(entry, tmp_path):
    # Nesting by entry names is what write_torch does for one level; deeper ones by hand.
    weights = {f"module._orig_mod.{name}": value for name, value in written().items()}
    path = tmp_path / "x.pth"
    head, _, rest = entry.partition(".")
    write_torch(path, weights, head if not rest else "PLACE")
    if rest:
        inner = b"X\x05\0\0\0model}X\x06\0\0\0module"
        with zipfile.ZipFile(path) as archive:
            old = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
        body = old.pop("data.pkl").replace(b"X\x05\0\0\0PLACE", inner)[:-1] + b"s."
        archive_of(path, body, old)
    read = read_state_dict(path)
    assert read.entry == entry and set(read.tensors) == set(written())
    if entry:
        assert set(read_state_dict(path, entry).tensors) == set(written())
        with pytest.raises(UserError, match=f"no entry 'other'; it has: {head}"):
            read_state_dict(path, "other")


def test_no_state_dict(tmp_path):
    path = archive_of(tmp_path / "x.pth", pickle.dumps({"epoch": 3, "args": {"lr": 1}}, 2))
    with pytest.raises(UserError, match="holds no state dict; it has: epoch, args"):
        read_state_dict(path)
    with pytest.raises(UserError, match="holds no state dict"):
        read_state_dict(archive_of(path, pickle.dumps(3, 2)))
