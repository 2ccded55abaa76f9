"""Tables of captions with image files: columns and names found by looking, bad rows counted."""

import csv
import hashlib
import io
import pickle

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from pair_folders import jpeg, read_all

from ovseg_jax.data.prepare import source_table
from ovseg_jax.data.prepare.rules import BAD_ROW
from ovseg_jax.data.prepare.source_table import FileSource
from ovseg_jax.errors import UserError

CAPTIONS = ["a dog, and a cat", 'the "dog"', "dogs\u2019 home", "a caf\u00e9 with a dog", "x dog"]
URLS = [f"https://example.org/pictures/{index}%20a.jpg?size=big" for index in range(5)]
IMAGES = [jpeg(index) for index in range(5)]


def usual(pairs):
    return [(pair.key, *pair.captions, pair.image) for pair in pairs]


EXPECTED = list(zip(URLS, CAPTIONS, IMAGES, strict=True))


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for index, image in enumerate(IMAGES):
        (folder / f"{index} a.jpg").write_bytes(image)
    return folder


def test_cc12m_and_cc3m_order_are_recognized(tmp_path, images):
    cc12m, cc3m = tmp_path / "cc12m.tsv", tmp_path / "cc3m.tsv"
    rows = list(zip(URLS, CAPTIONS, strict=True))
    cc12m.write_text("".join(f"{url}\t{caption}\n" for url, caption in rows), "utf-8")
    cc3m.write_text("".join(f"{caption}\t{url}\r\n" for url, caption in rows), "utf-8")
    for path, columns in ((cc12m, (1, 2)), (cc3m, (2, 1))):
        source = FileSource(path, images)
        assert "image in column {}, caption in column {}, found".format(*columns) in source.name
        assert usual(read_all(source)) == EXPECTED
        assert "image files named by end of the URL" in source.name
        assert [pair.image for pair in read_all(source, images=False)] == [None] * 5


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_header_names_the_columns(tmp_path, images, mark, separator):
    path = tmp_path / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        stream.write(mark)
        writer = csv.writer(stream, delimiter=separator)
        writer.writerow(["id", "Width", "URL", "TEXT"])
        for number, (url, caption) in enumerate(zip(URLS, CAPTIONS, strict=True)):
            writer.writerow([f"k{number}", 640, url, caption + "\nsecond line"])
    pairs = read_all(FileSource(path, images))
    assert usual(pairs) == [
        (f"k{n}", caption + "\nsecond line", image)
        for n, (_, caption, image) in enumerate(EXPECTED)
    ]


NAMES = {
    "path in the table": lambda n: f"sub/{n}.png",
    "end of the URL": lambda n: f"{n} a.jpg",
    "MD5 of the URL": lambda n: hashlib.md5(URLS[n].encode()).hexdigest() + ".jpg",
    "SHA-256 of the URL": lambda n: hashlib.sha256(URLS[n].encode()).hexdigest(),
    "number of the row, 9 digits": lambda n: f"{n:09d}.webp",
    "number of the row": lambda n: f"{n}.jpeg",
}


@pytest.mark.parametrize("naming", NAMES)
@pytest.mark.parametrize("header", [False, True])
def test_naming_of_image_files_is_found(tmp_path, naming, header):
    cells = [NAMES[naming](n) if naming == "path in the table" else URLS[n] for n in range(5)]
    rows = [f"{cell}\t{caption}" for cell, caption in zip(cells, CAPTIONS, strict=True)]
    path = tmp_path / "t.tsv"
    path.write_text("\n".join((["url\tcaption"] if header else []) + rows), "utf-8")
    for number, image in enumerate(IMAGES):
        if number != 3:
            file = tmp_path / NAMES[naming](number)
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(image)
    source = FileSource(path)
    assert source.name.endswith(f"named by {naming}")
    assert [pair.image for pair in read_all(source)] == [*IMAGES[:3], None, IMAGES[4]]


def test_shards_hold_every_row_once(tmp_path, images, monkeypatch):
    monkeypatch.setattr(source_table, "_PER_SHARD", 2)
    for name, quoted in (("t.csv", True), ("t.tsv", False)):
        path = tmp_path / name
        with path.open("w", newline="", encoding="utf-8") as stream:
            if quoted:
                rows = zip(URLS, [c + "\nnext" for c in CAPTIONS], strict=True)
                csv.writer(stream).writerows(rows)
            else:
                stream.write("".join(f"{url}\t{c}\n" for url, c, _ in EXPECTED))
        source = FileSource(path, images)
        shards = source.shards()
        assert [shard.first for shard in shards] == [0, 2, 4]
        assert [pair.key for pair in source.read(shards[1])] == URLS[2:4]
        assert [pair.key for pair in read_all(source)] == URLS


@pytest.mark.parametrize("per_shard", [2, 100])
@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
def test_rows_of_one_image_are_its_captions(tmp_path, images, monkeypatch, per_shard, name):
    """Also where they are apart, in other shards, and where a row between them is bad."""
    monkeypatch.setattr(source_table, "_PER_SHARD", per_shard)
    separator = "," if name == "t.csv" else "\t"
    rows = [
        (0, "a dog"), (1, "a cat"), (0, "one dog"), (2, "x"), (2, "x"), (1, "two"), (0, "three"),
    ]  # fmt: skip
    lines = ["url" + separator + "caption"]
    lines += [f"{URLS[image]}{separator}{caption}" for image, caption in rows]
    lines.insert(3, URLS[0])
    path = tmp_path / name
    path.write_text("\n".join(lines))
    source = pickle.loads(pickle.dumps(FileSource(path, images)))
    pairs = read_all(source)
    assert [(pair.key, pair.captions, pair.image) for pair in pairs] == [
        (URLS[0], ("a dog", "one dog", "three"), IMAGES[0]),
        (URLS[1], ("a cat", "two"), IMAGES[1]),
        ("row 2", (), None),
        (URLS[2], ("x", "x"), IMAGES[2]),
    ]
    assert sum(shard.stop - shard.start for shard in source.shards()) < path.stat().st_size


def test_bad_rows_are_counted(tmp_path, images):
    path = tmp_path / "t.tsv"
    lines = [f"{url}\t{caption}".encode() for url, caption, _ in EXPECTED]
    lines[1] = b"no tab here"
    lines[2] = f"{URLS[2]}\tcaf\u00e9".encode("latin-1")
    lines.insert(4, b"")
    lines.insert(4, b"\ta caption alone")
    path.write_bytes(b"\n".join(lines))
    pairs = read_all(FileSource(path, images))
    assert [pair.key for pair in pairs] == [URLS[0], "row 1", URLS[2], URLS[3], "row 4", URLS[4]]
    assert [pair.cause for pair in pairs] == ["", BAD_ROW, "", "", BAD_ROW, ""]
    assert pairs[2].captions == ("caf\udce9",)


ANY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
CELL = st.text(st.sampled_from("ab ,;\"'\\\n\t\u00e9"), max_size=12)
PLAIN = st.text(st.sampled_from("ab ,;\"'\\\u00e9"), max_size=12)


def table_of(folder, name, content):
    """(rows, pairs with a cause) of a table whose images are all one file."""
    (folder / "x.jpg").touch()
    path = folder / name
    path.write_text(content, "utf-8", newline="")
    pairs = read_all(FileSource(path))
    rows = [(pair.key, caption) for pair in pairs for caption in pair.captions]
    return rows, [pair for pair in pairs if pair.cause]


@ANY
@given(
    captions=st.lists(CELL, min_size=1, max_size=8),
    separator=st.sampled_from(",\t"),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_quoted_rows_are_those_of_the_csv_module(tmp_path, captions, separator, quoting, end):
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=separator, quoting=quoting, lineterminator=end)
    writer.writerows([("image", "caption"), *(("x.jpg", caption) for caption in captions)])
    stream.seek(0)
    expected = [tuple(row) for row in csv.reader(stream, delimiter=separator)][1:]
    name = "t.csv" if separator == "," else "t.tsv"
    rows, bad = table_of(tmp_path, name, stream.getvalue())
    assert (rows, bad) == (expected, [])


@ANY
@given(captions=st.lists(PLAIN, min_size=1, max_size=8), extra=st.sampled_from(["", "in", "out"]))
@example(captions=['"'] * 3, extra="in")
def test_unquoted_rows_are_lines(tmp_path, captions, extra):
    """As in CC12M: a quote is a letter, also where it begins a caption and never ends."""
    more = {"": [], "in": ['the "dog" house'] * 30, "out": ['"Hello" she said'] * 30}
    captions = captions + more[extra]
    has_quotes = any('"' in caption for caption in captions)
    assume(extra or not has_quotes)
    rows, bad = table_of(tmp_path, "t.tsv", "".join(f"x.jpg\t{text}\n" for text in captions))
    assert (rows, bad) == ([("x.jpg", text) for text in captions], [])


@ANY
@given(
    captions=st.lists(st.text(st.sampled_from("ab ,\u00e9"), max_size=9), min_size=2, max_size=9),
    broken=st.integers(0, 8),
    cut=st.booleans(),
)
def test_row_that_is_never_closed_costs_itself_alone(tmp_path, captions, broken, cut):
    # A file without a whole row is refused.
    broken = max(broken % len(captions), int(cut))
    lines = [f'x.jpg,"{caption} ""so"""\n' for caption in captions]
    # The quote that ends the cell is missing, or a file was cut within its last row.
    lines[broken] = f'x.jpg,"{captions[broken]}' + ("" if cut else "\n")
    if cut:
        del lines[broken + 1 :]
    rows, bad = table_of(tmp_path, "t.csv", "image,caption\n" + "".join(lines))
    whole = [text for n, text in enumerate(captions[: len(lines)]) if n != broken]
    assert rows == [("x.jpg", f'{text} "so"') for text in whole]
    assert [pair.cause for pair in bad] == [BAD_ROW]


def test_rows_of_other_widths_empty_cells_and_quotes_behind_backslashes(tmp_path):
    lines = ["image,caption", "x.jpg,a dog, and a cat", '""', "x.jpg,a cat,", "x.jpg,a dog"]
    lines += [r'x.jpg,"a \"big\" dog, and a cat"', r'x.jpg,"a cat, 5\""', "x.jpg,a bus", ""]
    rows, bad = table_of(tmp_path, "t.csv", "\n".join(lines))
    quoted = ['a "big" dog, and a cat', 'a cat, 5"']
    assert [caption for _, caption in rows] == ["a cat", "a dog", *quoted, "a bus"]
    assert [pair.cause for pair in bad] == [BAD_ROW] * 2


@pytest.mark.parametrize(
    ("text", "kept", "bad"),
    [
        # Without a header too, a comma that should be in quotes cuts no caption in silence.
        ("x.jpg,a dog\nx.jpg,a cat, and a dog\nx.jpg,a bus\n", ["a dog", "a bus"], 1),
        # A later row closes the quote: the rows between are no caption.
        (
            'image,caption\nx.jpg,"a dog\nx.jpg,a cat\nx.jpg,a man"\nx.jpg,a bus\n',
            ["a cat", 'a man"', "a bus"],
            1,
        ),
        ('image,caption\nx.jpg,"a dog\nx.jpg,a man"\nx.jpg,a bus\n', ['a man"', "a bus"], 1),
        # The image behind a caption of several lines is no row of its own.
        (
            'caption,image\n"a dog\nand a cat",x.jpg\na bus,x.jpg\n',
            ["a dog\nand a cat", "a bus"],
            0,
        ),
        ("image,caption\nx.jpg,a dog\rx.jpg,a cat\nx.jpg,a bus\n", ["a bus"], 1),
    ],
)
def test_rows_that_would_swallow_others_are_counted(tmp_path, text, kept, bad):
    rows, unusable = table_of(tmp_path, "t.csv", text)
    assert [caption for _, caption in rows] == kept
    assert [pair.cause for pair in unusable] == [BAD_ROW] * bad


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.tsv", None, "there is no file"),
        ("t.parquet", "x", r"must be a \.tsv or \.csv"),
        ("t.tsv", "", "has no rows"),
        ("t.csv", "image,caption\rx.jpg,a dog\rx.jpg,a cat\r", "carriage return alone"),
        ("t.tsv", "a dog\na cat\n", "lacks a column.*'a dog'.*header"),
        ("t.csv", "https://a.org/1.jpg\n", "lacks a column"),
        ("t.tsv", "https://a.org/1.jpg\ta dog\n", "none of the first .* images.*MD5.*--images"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text.encode())
    with pytest.raises(UserError, match=message):
        FileSource(path)
    path = tmp_path / "good.tsv"
    path.write_text(f"{URLS[0]}\ta dog\n")
    with pytest.raises(UserError, match="no folder .*none; check --images"):
        FileSource(path, tmp_path / "none")
