"""A few seconds of `tests/fuzz.py`, the same inputs each time."""

import gc
import sys

import fuzz
import pytest

COUNTS = {"images": 40, "tables": 60, "tars": 30, "words": 150, "folders": 30, "configs": 60}
COUNTS |= {"weights": 60, "models": 5, "records": 30, "checkpoints": 6}


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_no_traceback_and_no_silent_loss(name, tmp_path, monkeypatch):
    # Orbax leaves coroutines behind where a read fails, which complain when they are collected.
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    outcomes = [fuzz.attempt(name, 0, number, tmp_path / "kept") for number in range(COUNTS[name])]
    assert None not in outcomes
    assert {True, False} <= set(outcomes), "nothing was refused, or everything"
    gc.collect()


def test_failure_is_printed_and_its_input_kept(tmp_path, monkeypatch, capsys):
    def broken(rng, folder):
        (folder / "x").write_bytes(rng.randbytes(3))
        raise KeyError("lost")

    monkeypatch.setitem(fuzz.TARGETS, "words", broken)
    monkeypatch.chdir(tmp_path)
    assert fuzz.main(["--only=words", "--iteration=4", "--seed=2"]) == 1
    said = capsys.readouterr().out
    assert "FAILED words --seed=2 --iteration=4" in said and "KeyError: 'lost'" in said
    assert (tmp_path / "fuzz-failures" / "words-2-4" / "x").stat().st_size == 3
