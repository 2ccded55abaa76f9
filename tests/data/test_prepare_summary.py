"""The report page, the dry run and the command line."""

import re
import xml.etree.ElementTree as ElementTree

import pytest
from pair_folders import jpeg, write_img2dataset

from ovseg_jax.data.prepare import rules
from ovseg_jax.data.prepare.summary import bars, page
from ovseg_jax.data.records import ArrayRecordSource
from ovseg_jax.errors import UserError
from ovseg_jax.prepare import main


def test_bars_are_as_long_as_their_values():
    rows = [list(row) for row in ElementTree.fromstring(bars({"a <b>": 50, "c": 100, "d": 0}))]
    found = [(name.text, bar.find("i").get("style"), n.text) for name, bar, n in rows]
    expected = [("a <b>", "width:50.0%", "50"), ("c", "width:100.0%", "100")]
    assert found == [*expected, ("d", "width:0.0%", "0")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("in")
    for shard in range(20):
        pairs = [
            (f"{shard:05d}<{n}>", f"a {noun} &lt;", jpeg(n))
            for n, noun in enumerate(["dog", "cat", "stone", "dog", "bird"])
        ]
        write_img2dataset(path, shard, pairs, failed=[f"f{shard}"])
    return path


def test_command_line(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([f"--source=img2dataset:{folder}", f"--out={out}", "--workers=0"]) == 0
    printed = capsys.readouterr()
    assert main([f"--verify={out}"]) == 0
    assert "80 records" in capsys.readouterr().out
    assert "80 of 120 pairs kept (66.7%)" in printed.out
    assert "shard 20 of 20: 6 pairs" in printed.err
    assert len(ArrayRecordSource(out)) == 80
    text = (out / "report.html").read_text()
    # One file that asks for no other.
    assert not re.search(r"<link|<script|src=|url\(|@import", text)
    assert "no entity" in text
    assert "00000&lt;2&gt;" in text, "keys are escaped"
    assert text.count('class="bars"') == 3


def test_page_of_a_report_without_anything():
    nothing = {"dropped": {}, "dropped_examples": {}, "captions_dropped": {}, "remarks": {}}
    nothing |= {"rules": {}, "damaged_shards": [], "caption_words": [0] * 81}
    texts = {"source": "s", "entities_source": "e", "tool": "t", "warnings": ["careful <b>"]}
    counts = {"kept": 0, "captions": 0, "read": 0, "input_shards": 1, "entities": {"dog": 0}}
    records = {"count": 0, "shards": 0, "bytes": 0, "keys_sha256": "0"}
    together = [("dog", "<cat>", 3)]
    text = page({**nothing, **texts, **counts, "records": records, "together": together})
    assert "careful &lt;b&gt;" in text and "dog + &lt;cat&gt;" in text
    assert text.count("<p>none</p>") == 2


def test_dry_run_writes_nothing(folder, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out"
    assert main([f"--source=img2dataset:{folder}", f"--out={out}", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    # Every third shard, whole: two of three pairs are kept, as in all of them.
    assert "dry run: 42 pairs of 7 of 20 shards; nothing is written" in printed
    assert "28 of 42 pairs kept (66.7%)" in printed
    assert f"{rules.NOT_DOWNLOADED}" in printed
    assert "dog 14, bird 7, cat 7 and 53 more" in printed
    assert "of a million pairs about 666,667 would be kept" in printed
    assert main([f"--source=img2dataset:{folder}", "--dry-run", "--entities=auto:2"]) == 0
    assert "entities named: dog 14, bird 7\n" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out=x"], "missing --source"),
        (["--source=scenes:5"], "missing --out"),
        (["--verify=x", "--out=y"], "goes with no other flag"),
        (["--verify=x"], "no folder of records at x"),
        (["--source=scenes:5", "--out=x", "--workers=-1"], "--workers=-1"),
        (["--source=scenes:5", "--out=x", "--beam_options=--a=b"], "--beam_options goes with"),
        (["--source=scenes:5", "--out=x", "--runner=DirectRunner", "--workers=2"], "--workers is"),
        (["--source=scenes:5", "--out=x", "--runner=FlinkRuner"], "--runner is one of local"),
        (["--source=scenes:5", "--out=hdfs://b/x"], "hdfs://b/x must be a path of this machine"),
        (["--source=scenes:5", "--out=gs://b/x"], "gs://b/x needs gcsfs: pip install"),
        (["--source=img2dataset:s3://b/x", "--dry-run"], "s3://b/x needs s3fs: pip install"),
        (["--sorce=zip:5", "--out=x"], "did you mean '--source'"),
    ],
)
def test_mistakes_are_explained(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        main(arguments)
    assert not list(tmp_path.iterdir())
