"""Damaged and odd input for every reader of the package: no traceback, and no row lost in silence.

python tests/fuzz.py [--minutes=1] [--seed=0] [--only=NAME] [--iteration=N]

Every input is whole input that was changed at random, and follows from the seed, the target and the
number of the iteration. Tables, tars and word lists are counted by another reader too: the csv
module, tarfile, pyarrow, or lines. An input that fails is kept in ./fuzz-failures.
"""

import argparse
import copy
import csv
import functools
import io
import json
import random
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

TESTS = Path(__file__).parent
sys.path += [str(TESTS), str(TESTS / "data")]

import jax  # noqa: E402
import numpy as np  # noqa: E402
import onnx  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from flax.traverse_util import unflatten_dict  # noqa: E402
from memory_source import MemorySource  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402
from pair_folders import add_file, encoded, pixels, write_img2dataset  # noqa: E402
from PIL import Image  # noqa: E402
from record_folder import write_manifest, write_records  # noqa: E402

from ovseg_jax.data import decoding  # noqa: E402
from ovseg_jax.data.entities import EntitySet  # noqa: E402
from ovseg_jax.data.prepare.pairs import Damage, RawPair  # noqa: E402
from ovseg_jax.data.prepare.rules import LOST, NOT_DOWNLOADED, Rules  # noqa: E402
from ovseg_jax.data.prepare.shard import Tally, judge_all  # noqa: E402
from ovseg_jax.data.prepare.source_img2dataset import Img2DatasetSource  # noqa: E402
from ovseg_jax.data.prepare.source_table import FileSource  # noqa: E402
from ovseg_jax.data.records import ArrayRecordSource, Record, describe_file  # noqa: E402
from ovseg_jax.data.tokenizer import Tokenizer  # noqa: E402
from ovseg_jax.errors import UserError  # noqa: E402
from ovseg_jax.flags import apply_override, paths  # noqa: E402
from ovseg_jax.models.build import build_model, variable_shapes  # noqa: E402
from ovseg_jax.predict import pictures  # noqa: E402
from ovseg_jax.segmentation.benchmarks import OwnFolder  # noqa: E402
from ovseg_jax.segmentation.pictures import read_image  # noqa: E402
from ovseg_jax.segmentation.protocol import Protocol, saved_protocol  # noqa: E402
from ovseg_jax.segmentation.vocabulary import Vocabulary, read_text, read_words  # noqa: E402
from ovseg_jax.train.checkpoint import Checkpoints  # noqa: E402
from ovseg_jax.train.config import complete, load_config, plain  # noqa: E402
from ovseg_jax.train.step import TrainState  # noqa: E402
from ovseg_jax.weights import model_dir  # noqa: E402
from ovseg_jax.weights.pth import read_checkpoint  # noqa: E402
from ovseg_jax.weights.weight_files import file_digest  # noqa: E402

SECONDS = 60  # an input that takes longer is a failure
PIECES = [
    *(b'"', b'""', b"\n", b"\r", b"\r\n", b"\n\n", b"\0", b",", b";", b"\t", b"\\", b"#", b"|"),
    *(b"\xff", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\xc2\x85", b"\x0c", b"\xed\xa0\x80", b"  "),
    *(b"-1", b"1e400", b"NaN", b"null", b"0: ", b"9" * 30, b"9" * 5000, b"\x7f\xff\xff\xff"),
    *(b"\xff" * 8, b"\0" * 512, b"\0" * 10240, b"[" * 100_000, b"{}", b"x" * 140_000),
]
TEXTS = ["a dog", "a cat, a dog", 'the "dog"', "caf\u00e9", "", "a\ndog", "5\\", "# dog"]
TEXTS += ["\U0001f600", "background", "__ignore__", "0: cat", "1: dog", "cat|dog", "x" * 300]
TEXTS += ["'", "a;b", "a\tdog"]
VALUES = [None, True, False, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, -0.0, 1e300, float("nan")]
VALUES += [float("inf"), "", "x", "clip", "none", "50%", "0,5", "\0", "a {}", [], [1], [[]], ["{}"]]
VALUES += [{}, {"a": 1}, [{"weight": -1}], [None], "1e400", "(1, 2)", "[" * 3000, "paper"]


def mutated(rng: random.Random, data: bytes, other: bytes = b"") -> bytes:
    """Data after up to eight changes; `other` is what pieces are spliced in from."""
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3, 8])):
        end = len(data) + 1 if rng.random() < 0.7 else min(len(data) + 1, 64)
        start, stop = sorted(rng.randrange(end) for _ in range(2))
        near = start + rng.randrange(1, 9)
        piece = rng.choice(PIECES)
        flipped = bytes(byte ^ 1 << rng.randrange(8) for byte in data[start:near])
        data = rng.choice(
            [
                data[:start] + flipped + data[near:],
                data[:start] + rng.randbytes(near - start) + data[near:],
                data[:start] + piece + data[start:],
                data[:start] + piece + data[start + len(piece) :],
                data[:start] + data[near:],
                data[:start] + data[stop:],
                data[:stop] + data[start:],
                data[:start],
                data[:start] + other[rng.randrange(len(other) + 1) :],
            ]
        )
    return data


def changed(rng: random.Random, tree: object) -> object:
    """A copy of plain values with up to three values changed, removed or added."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randrange(1, 4)):
        node = tree
        while True:
            key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.2:
                break
            node = node[key]
        if rng.random() < 0.15 and isinstance(node, dict):
            node[rng.choice([f"{key}s", "x", ""])] = node.pop(key) if len(node) > 1 else 0
        else:
            node[key] = copy.deepcopy(rng.choice(VALUES))
    return tree


def counted(items: list) -> list:
    """The pairs of a source, after `prepare` counted each as kept or dropped."""
    tally = Tally()
    pairs = [item for item in items if not isinstance(item, Damage)]
    kept = list(judge_all(iter(items), "x", Rules(), EntitySet({"dog": []}), tally))
    assert tally.kept == len(kept)
    assert tally.kept + tally.dropped.total() == len(pairs), "a pair is neither kept nor dropped"
    return pairs


# ---- targets: each writes an input below `folder`, and says whether it was refused, or raises a
# UserError, which is a refusal too


@functools.cache
def image_files() -> list[tuple[str, bytes]]:
    rgb, gray = Image.fromarray(pixels()), Image.fromarray(pixels(channels=1))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a dog"
    deep = Image.fromarray(pixels(channels=1).astype(np.uint16) * 256)
    frames = {"save_all": True, "append_images": [Image.fromarray(pixels(1))] * 2}
    files = [(x, encoded(rgb, x)) for x in ("BMP", "PPM", "TGA", "WEBP", "AVIF", "JPEG2000")]
    files += [("JPEG", encoded(rgb, "JPEG", exif=exif, progressive=p)) for p in (False, True)]
    files += [("JPEG", encoded(rgb.convert("CMYK"), "JPEG")), ("TIFF", encoded(deep, "TIFF"))]
    files += [("PNG", encoded(x, "PNG", exif=exif)) for x in (rgb, rgb.quantize(), gray, deep)]
    files += [("PNG", encoded(rgb.convert("RGBA"), "PNG")), ("GIF", encoded(rgb, "GIF"))]
    files += [(x, encoded(rgb, x, **frames)) for x in ("GIF", "PNG", "WEBP", "TIFF")]
    files += [("TIFF", encoded(gray.convert("F"), "TIFF", compression="tiff_lzw"))]
    return files


def images(rng: random.Random, folder: Path) -> bool:
    (kind, data), (_, other) = (rng.choice(image_files()) for _ in range(2))
    data = mutated(rng, data, other)
    path = folder / f"x.{kind.lower()}"
    path.write_bytes(data)
    refused = 0
    for read in (
        lambda: np.asarray(decoding.decode(data)),
        lambda: np.asarray(decoding.decode_reduced(data, lambda size: (0, 0, *size), 8)[0]),
        lambda: read_image(path),
    ):
        try:
            image = read()
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        except (UserError, decoding.UnreadableImage):
            refused += 1
    shown = [picture.image for picture in pictures([str(path)])]
    assert shown, "predict passes over an image in silence"
    counted([RawPair("k", ("a dog",), data)])
    return refused > 0


def _table(rng: random.Random, separator: str) -> bytes:
    stream = io.StringIO(newline="")
    quoting, end = rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), rng.choice(["\n", "\r\n"])
    writer = csv.writer(stream, delimiter=separator, quoting=quoting, lineterminator=end)
    writer.writerow(["image", "caption"])
    rows = [(rng.choice(["x.jpg", "y.jpg", "z"]), rng.choice(TEXTS)) for _ in range(12)]
    writer.writerows(rows[: rng.randrange(1, 12)])
    if separator == "\t" and rng.random() < 0.4:  # quotes are letters, as in CC12M
        lines = ["image\tcaption", *(f"{a}\t{' '.join(b.split())}" for a, b in rows)]
        return end.join(lines).encode()
    return stream.getvalue().encode()


def tables(rng: random.Random, folder: Path) -> bool:
    kind, separator = rng.choice([("csv", ","), ("csv", ";"), ("csv", "\t"), ("tsv", "\t")])
    data = mutated(rng, _table(rng, separator), _table(rng, separator))
    path = folder / f"t.{kind}"
    path.write_bytes(data)
    (folder / "x.jpg").write_bytes(image_files()[6][1])
    source = FileSource(path)
    pairs = counted([pair for shard in source.shards() for pair in source.read(shard)])
    # A kept pair has the captions of every row with its image, and another pair is one row.
    count = sum(max(1, len(pair.captions)) for pair in pairs)
    count += "named by its header" in source.name
    lines = [x for x in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if x.strip(b"\r")]
    rows = [cells for _, cells in source._rows(0)]
    assert count == len(rows) <= len(lines) <= sum(1 + "".join(r).count("\n") for r in rows)
    if not source._quoted:
        assert count == len(lines), "a line is no row"
        return False
    text = data.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    stream = io.StringIO(text, newline="")
    try:
        known = [row for row in csv.reader(stream, delimiter=source._separator, strict=True) if row]
    except csv.Error:
        return False
    # Ours reads more where rows are of several lengths or quotes follow backslashes, and takes no
    # carriage return alone for the end of a row.
    if len(set(map(len, known))) == 1 and not re.search(r"\\|\r(?!\n)", text):
        assert known == rows, "the csv module reads other rows"
    return False


def tars(rng: random.Random, folder: Path) -> bool:
    numbers, parts, plain_names = iter(range(100)), [], True
    pairs = [(f"{next(numbers):09d}", rng.choice(TEXTS), rng.randbytes(200)) for _ in range(4)]
    path = write_img2dataset(folder, 0, pairs, ["000000050"], rng.choice(["jpg", "png"]))
    with tarfile.open(path) as archive:
        files = [(member.name, archive.extractfile(member).read()) for member in archive]
    for _ in range(rng.choice([1, 1, 2])):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as archive:
            for name, content in files:
                if rng.random() < 0.1:
                    others = [name.upper(), f"a/{name}", f"._{name}", "a.b.jpg", "x", name]
                    name = rng.choice(others)
                if rng.random() < 0.05:
                    content = mutated(rng, content)
                for _ in range(rng.choice([0, 2]) if rng.random() < 0.05 else 1):
                    add_file(archive, name, content)
                plain_names &= Path(name).name.count(".") == 1
        parts.append(stream.getvalue())
        files = [(f"1{name[1:]}", content) for name, content in files]
    data = b"".join(parts)
    data = mutated(rng, data, parts[0]) if rng.random() < 0.7 else data
    path.write_bytes(data)
    table = path.with_suffix(".parquet")
    if rng.random() < 0.3:
        table.write_bytes(mutated(rng, table.read_bytes()))
    source = Img2DatasetSource(folder)
    items = [item for shard in source.shards() for item in source.read(shard)]
    said = [item.what for item in items if isinstance(item, Damage)]
    found = counted(items)
    try:
        keys = [str(row["key"]) for row in pq.read_table(table).to_pylist()]
    except Exception:
        keys = []
    if not any("is not used" in text for text in said):
        lost = Counter(keys) - Counter(pair.key.rpartition("/")[2] for pair in found)
        assert not lost, f"rows of the parquet file are gone: {lost}"
    damaged = any("cannot be read after" in text for text in said)
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:", ignore_zeros=True) as archive:
            names = [m.name for m in archive if not decoding.is_foreign(Path(m.name).name)]
    except tarfile.TarError:
        assert damaged, "tarfile refuses the tar, which nothing says"
        return True
    present = [pair for pair in found if pair.cause not in (LOST, NOT_DOWNLOADED)]
    keys = [name.rpartition(".")[0] for name in names]
    groups = sum(a != b for a, b in zip(keys, ["", *keys], strict=False))
    if not damaged and plain_names:
        # More where tars are behind one another and not in whole blocks: tarfile finds only some.
        assert groups <= len(present), f"{groups} keys, {len(present)} pairs"
    return damaged


def words(rng: random.Random, folder: Path) -> bool:
    entries = [rng.choice([*TEXTS, *"abcdefgh"]) for _ in range(rng.randrange(1, 8))]
    if rng.random() < 0.4:
        entries = [f"{n}: {word}" for n, word in enumerate("abcdef")]
    data = rng.choice(["\n", "\r\n", ",", ", "]).join(entries).encode()
    data = mutated(rng, data, b"cat\ndog\nbird\n")
    path = folder / "classes.txt"
    path.write_bytes(data)
    classes, background = read_words(read_text(path), "x")
    Vocabulary.of(classes)
    lines = re.split("\r\n|\r|\n", data.decode().removeprefix("\ufeff"))
    lines = [line.strip() for line in lines if line.strip() and line.strip()[0] != "#"]
    if len(lines) == 1:
        lines = re.split(r"(?<!\\),", re.sub(r"(?<!\\),$", "", lines[0]))
    ignored = re.fullmatch(r"(\d+\s*[:\t]\s*)?__ignore__", lines[0].strip()) is not None
    assert len(lines) == len(classes) + background + ignored, "a label has moved"
    return False


def folders(rng: random.Random, folder: Path) -> bool:
    mask = np.zeros((40, 48), np.uint8)
    mask[5:20, 5:20] = 1
    whole = encoded(rng.choice([Image.fromarray(mask), Image.fromarray(mask).convert("P")]))
    changes = rng.randrange(1, 8)
    names = ["classes.txt", "images/a.jpg", "masks/a.png"]
    for number, name in enumerate(names):
        data = (b"background\ncat\n", image_files()[0][1], whole)[number]
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(mutated(rng, data, whole) if changes >> number & 1 else data)
    OwnFolder(str(folder))[0]
    return False


@functools.cache
def config() -> dict:
    return plain(load_config(f"{TESTS}/tiny.py"))


def configs(rng: random.Random, folder: Path) -> bool:
    kind = rng.randrange(3)
    if kind:
        tree = changed(rng, config() if kind == 1 else Protocol().as_dict())
        (folder / "input.json").write_text(json.dumps(tree))
        complete(ConfigDict(tree)) if kind == 1 else Protocol.from_config(tree)
        return False
    ours = complete(ConfigDict(copy.deepcopy(config())))
    key = rng.choice(list(paths(ours)))
    text = str(rng.choice([*VALUES, ours.to_dict().get(key, key), *TEXTS]))
    if rng.random() < 0.3:
        key, text = (mutated(rng, x.encode()).decode("utf-8", "replace") for x in (key, text))
    (folder / "input.txt").write_text(f"--config.{key}={text}")
    apply_override(ours, key, text)
    if "[" not in key:  # a number that is accepted is the number that was written
        node = functools.reduce(lambda node, name: node[name], key.split("."), ours)
        assert type(node) is not float or node == float(text)
    return False


@functools.cache
def weight_files() -> list[tuple[str, bytes]]:
    arrays = {"a.weight": np.arange(6.0, dtype=np.float32).reshape(2, 3), "b": np.ones(4)}
    with tempfile.TemporaryDirectory() as name:
        model_dir.write_safetensors(Path(name, "x"), arrays)
        safe = Path(name, "x").read_bytes()
    packed, plain_zip = io.BytesIO(), io.BytesIO()
    np.savez_compressed(packed, **arrays)
    np.savez(plain_zip, **arrays)
    given = [onnx.numpy_helper.from_array(x, name) for name, x in arrays.items()]
    node = onnx.helper.make_node("MatMul", ["x", "onnx::a"], ["y"], "/a/MatMul")
    given.append(onnx.numpy_helper.from_array(arrays["b"], "onnx::a"))
    graph = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [], given))
    files = [("npz", packed.getvalue()), ("npz", plain_zip.getvalue()), ("safetensors", safe)]
    torch = [TESTS / "weights" / f"torch_{x}.pth" for x in ("zip", "stream")]
    files += [("pth", path.read_bytes()) for path in torch]
    return [*files, ("onnx", graph.SerializeToString())]


def weights(rng: random.Random, folder: Path) -> bool:
    (kind, data), (_, other) = (rng.choice(weight_files()) for _ in range(2))
    path = folder / f"x.{kind}"
    path.write_bytes(mutated(rng, data, other))
    arrays = read_checkpoint(path)
    assert all(isinstance(x, np.ndarray) for x in arrays.tensors.values())
    return False


@functools.cache
def scratch() -> Path:
    """Whole folders that targets copy: a model, records and checkpoints."""
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    (root / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\ndog\n")
    shapes = variable_shapes(build_model(complete(ConfigDict(config())).model))
    params = unflatten_dict({k: np.zeros(x, np.float32) for k, x in shapes.items()}, sep="/")
    about = {"protocol": Protocol().as_dict(), "benchmarks": {}, "provenance": {"steps": 3}}
    about |= {"model": config()["model"], "text_length": 8}
    about |= {"batch_stats": params.pop("batch_stats", {})}
    model_dir.save_model(root / "models", params, Tokenizer(root), **about)
    texts = (("a dog",), ("a dog", "b"))
    every = [Record(image_files()[n][1], texts[n % 2], f"k{n}", (0,)) for n in range(6)]
    write_records(MemorySource(every), root / "records", entity_names=["dog"], shard_size=4)
    with closing(Checkpoints(root / "checkpoints")) as checkpoints:
        for step in (1, 2):
            checkpoints.save(_state(step), {"phase": step})
    return root


def _state(step: int) -> TrainState:
    params = {"a": jax.numpy.full((4, 30), step, np.float32)}
    return TrainState(jax.numpy.int32(step), jax.numpy.int32(0), params, {"mu": params}, {})


def _copied(rng: random.Random, folder: Path, name: str) -> Path:
    """A copy of a folder of `scratch` with a file changed or gone, which is returned."""
    shutil.copytree(scratch() / name, folder / name)
    path = rng.choice(sorted(p for p in (folder / name).rglob("*") if p.is_file()))
    data = mutated(rng, path.read_bytes())
    path.write_bytes(data)
    if rng.random() < 0.1:
        path.unlink()
    return path


def models(rng: random.Random, folder: Path) -> bool:
    path, about = _copied(rng, folder, "models"), folder / "models" / model_dir.CONFIG
    if about.is_file() and path.is_file() and rng.random() < 0.8:
        # Digests that fit what was changed: the checks behind them have to hold too.
        info = json.loads((scratch() / "models" / model_dir.CONFIG).read_text())
        info = changed(rng, info) if path in (about, path.with_name("README.md")) else info
        if isinstance(info.get("files_sha256"), dict) and path.name in info["files_sha256"]:
            info["files_sha256"][path.name] = file_digest(path)
        info.pop(model_dir.SELF, None)
        about.write_text(json.dumps(info))
    saved = model_dir.load_model(folder / "models")
    saved_protocol(saved.info)
    saved.tokenizer.encode(["a dog"], 8)
    return False


def records(rng: random.Random, folder: Path) -> bool:
    path = _copied(rng, folder, "records")
    whole = ArrayRecordSource(scratch() / "records")
    if path.is_file() and path.name != "manifest.json" and rng.random() < 0.7:
        files = whole.manifest
        again = {x: describe_file(path, x.count) for x in files.everything() if x.file == path.name}
        shards = tuple(again.get(x, x) for x in files.shards)
        index = again.get(files.index, files.index)
        write_manifest(path.parent, replace(files, shards=shards, index=index))
    source = ArrayRecordSource(folder / "records")
    found = [source[number] for number in range(len(source))]
    assert len(source.keys()) == len(source.captions()) == len(found) == len(whole)
    source.verify()
    source.entity_index()
    return False


def checkpoints(rng: random.Random, folder: Path) -> bool:
    _copied(rng, folder, "checkpoints")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), _state(1)
    )
    said: list[str] = []
    with closing(Checkpoints(folder / "checkpoints")) as kept:
        state, position = kept.restore_latest(lambda _: abstract, said.append)
    assert position["step"] == 2 or said, "the latest checkpoint is passed over in silence"
    assert int(state.step) == position["step"]
    return bool(said)


_ALL = [images, tables, tars, words, folders, configs, weights, models, records, checkpoints]
TARGETS: dict[str, Callable[[random.Random, Path], bool]] = {one.__name__: one for one in _ALL}


class TooLongError(BaseException):
    """Not an Exception: readers may catch all of those."""


def _too_long(*_: object) -> None:
    raise TooLongError(f"it took more than {SECONDS} seconds")


def attempt(name: str, seed: int, iteration: int, keep: Path) -> bool | None:
    """Whether an input was refused; None after a failure, which is printed and its input kept."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(SECONDS)
        try:
            return TARGETS[name](random.Random(f"{seed} {name} {iteration}"), Path(folder))
        except UserError:
            return True
        except (Exception, TooLongError):
            place = keep / f"{name}-{seed}-{iteration}"
            shutil.copytree(folder, place, dirs_exist_ok=True)
            print(f"FAILED {name} --seed={seed} --iteration={iteration}, its input is {place}")
            traceback.print_exc(limit=-4, file=sys.stdout)
            return None
        finally:
            signal.alarm(0)


def main(argv: list[str]) -> int:
    """The exit code: 1 where any input failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TARGETS)
    parser.add_argument("--iteration", type=int, help="this one alone")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    names, failed = [args.only] if args.only else list(TARGETS), 0
    for name in names:
        attempt(name, args.seed, 0, Path("fuzz-failures"))  # what is made once counts for none
        end, outcomes = time.monotonic() + 60 * args.minutes / len(names), Counter()
        if args.iteration is not None:
            outcomes[attempt(name, args.seed, args.iteration, Path("fuzz-failures"))] += 1
            end = 0
        while time.monotonic() < end:
            outcomes[attempt(name, args.seed, outcomes.total(), Path("fuzz-failures"))] += 1
        failed += outcomes[None]
        counts = f"{outcomes.total()} inputs, {outcomes[True]} refused, {outcomes[None]} failed"
        print(f"{name}: {counts}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
