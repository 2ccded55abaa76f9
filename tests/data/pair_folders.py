"""Inputs for tests of preparation: images, and folders as other programs write them."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def pixels(seed=0, side=40, channels=3):
    shape = (side, side + 8) + ((channels,) if channels > 1 else ())
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def jpeg(seed=0, side=40):
    return encoded(Image.fromarray(pixels(seed, side)), "JPEG", quality=90)


def read_all(source, **options):
    """Every pair of a source."""
    return [pair for shard in source.shards() for pair in source.read(shard, **options)]


def row(key, caption, status="success"):
    """A row of img2dataset's parquet file, which KEY.json holds too."""
    error = None if status == "success" else "HTTP Error 404: Not Found"
    text = {"url": f"http://example.org/{key}.jpg", "caption": caption, "key": key}
    return {**text, "status": status, "error_message": error, "width": 48, "height": 40}


def add_file(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_img2dataset(folder, number, pairs, failed=(), image_kind="jpg", parquet=True):
    """One shard as img2dataset writes it: NNNNN.tar and NNNNN.parquet.

    Args:
      pairs: (key, caption, image bytes) of what was downloaded; captions may be bytes.
      failed: keys of what was not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    with tarfile.open(folder / f"{number:05d}.tar", "w|") as archive:
        for key, caption, image in pairs:
            text = caption if isinstance(caption, bytes) else caption.encode()
            rows.append(row(key, text.decode("utf-8", "replace")))
            add_file(archive, f"{key}.{image_kind}", image)
            add_file(archive, f"{key}.json", json.dumps(rows[-1], indent=4).encode())
            add_file(archive, f"{key}.txt", text)
    rows += [row(key, "a dog that is gone", "failed_to_download") for key in failed]
    if parquet:
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{number:05d}.parquet")
    return folder / f"{number:05d}.tar"
