"""The command line: config files, overrides, flags, exit codes."""

import errno
import re
import sys

import pytest
from ml_collections import ConfigDict

from ovseg_jax import flags
from ovseg_jax.errors import RestartError, UserError

FILE = """
from ml_collections import ConfigDict

def get_config(variant=''):
    if variant not in ('', 'small'):
        raise ValueError(f'no variant {variant!r}; there is: small')
    return ConfigDict({'width': 8 if variant else 64, 'variant': variant})
"""


def a_config():
    return ConfigDict(
        {
            "seed": 0,
            "rate": 0.5,
            "name": "vit",
            "flip": False,
            "limit": None,
            "betas": (0.9, 0.99),
            "sizes": [1, 2],
            "words": ("cat", "dog"),
            "model": {"depth": 6, "group_layer": 0},
            "protocol": {"scale": 10.0, "threshold": None},
            "crops": {"scale": (0.1, 1.0)},
            "phases": [ConfigDict({"steps": 10, "rate": 1.0}), {"steps": 20, "rate": 2.0}],
        }
    )


def look_up(config, key):
    for name, index in re.findall(r"(\w*[a-z]\w*)|\[(\d+)\]", key):
        config = config[name or int(index)]
    return config


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("seed", "7", 7),
        ("rate", "2", 2.0),
        ("name", "12", "12"),
        ("name", "'a b'", "a b"),
        ("flip", "true", True),
        ("limit", "None", None),
        ("limit", "abc", "abc"),
        ("betas", "[1, 0.5]", (1.0, 0.5)),
        ("sizes", "3,4,5", [3, 4, 5]),
        ("words", "emu,gnu", ("emu", "gnu")),
        ("betas[1]", "0.5", (0.9, 0.5)),
        ("phases[0].steps", "100", 100),
        ("phases[1].rate", "3", 3.0),
        ("phases[1].start_from", "best", "best"),  # absent so far
        ("protocol.scale", "None", None),
        ("protocol.threshold", "1", 1.0),
    ],
)
def test_override_has_the_type_of_the_present_value(key, text, value):
    config = a_config()
    flags.apply_override(config, key, text)
    found = look_up(config, key.removesuffix("[1]"))
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "key, text, said",
    [
        ("sead", "7", "'seed'"),
        ("model.depht", "7", "'model.depth'"),
        ("phases[1].step.x", "7", "'phases[1].steps'"),
        ("phases[2].steps", "7", "'phases[1].steps'"),
        ("seed", "1.5", "an int"),
        ("seed", "true", "an int"),
        ("rate", "1e400", "a finite number"),
        ("rate", "50%", "a float"),
        ("rate", "0,5", "a float"),
        ("betas", "(0.5, 1e400)", "a finite number"),
        ("flip", "1", "true or false"),
        ("betas", "0.5", "a tuple"),
        ("crops.scale", "None", "a tuple"),
        ("protocol.threshold", "abc", "a float"),
        ("protocol.threshold", "none ", "a float"),
        ("model", "3", "group_layer"),
        ("a..b", "3", "form"),
        ("phases.0.steps", "3", "form"),
    ],
)
def test_wrong_override_is_explained(key, text, said):
    config = a_config()
    with pytest.raises(UserError) as error:
        flags.apply_override(config, key, text)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert config == a_config()


def test_config_files_and_variants(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(FILE)
    assert flags.read_config(str(path)).width == 64
    assert flags.read_config(path).width == 64
    assert flags.read_config(f"{path}:small").width == 8
    with pytest.raises(UserError, match="there is: small"):
        flags.read_config(f"{path}:smal")
    with pytest.raises(UserError, match=r"does not exist; did you mean .*tiny\.py"):
        flags.read_config(str(tmp_path / "tyni.py"))


@pytest.mark.parametrize(
    "text, said",
    [
        ("x = 1", "get_config"),
        ("def get_config(:", "cannot be imported"),
        ("import no_such_module", "no_such_module"),
        ("def get_config(variant): return {}", "ConfigDict"),
    ],
)
def test_bad_config_file(tmp_path, text, said):
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        flags.read_config(str(path))


SPEC = (
    flags.Flag("config", help="the config file"),
    flags.Flag("mode", choices=("train", "eval"), default="train"),
    flags.Flag("steps", int, 3),
    flags.Flag("rate", float, 0.5),
    flags.Flag("dry-run", bool, False),
    flags.Flag("classes", flags.comma_list, ()),
)


def test_parse_both_forms_and_overrides_in_order():
    argv = ["--config=a.py", "--steps", "5", "--config.a=1", "--dry-run"]
    args = flags.parse([*argv, "--config.b[0]", "-2", "--config.a=2"], SPEC)
    assert (args.config, args.steps, args.mode, args.dry_run) == ("a.py", 5, "train", True)
    assert args.overrides == [("a", "1"), ("b[0]", "-2"), ("a", "2")]
    assert flags.parse(["--classes=cat, fire hydrant,"], SPEC).classes == ["cat", "fire hydrant"]
    assert flags.parse(["--config.a==x=y"], SPEC).overrides == [("a", "=x=y")]


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--step=3"], "'--steps'"),
        (["--steps=x"], "'x' is not a valid int"),
        (["--rate=1e400"], "'1e400' is not a finite number"),
        (["--rate=nan"], "'nan' is not a finite number"),
        (["--steps"], "needs a value"),
        (["--steps", "--mode=eval"], "needs a value"),
        (["--mode=test"], "train, eval"),
        (["--dry-run=2"], "true or false"),
        (["steps=3"], "unexpected argument"),
        (["--confg.a=3"], "unknown flag"),
    ],
)
def test_parse_errors(argv, said):
    with pytest.raises(UserError, match=said):
        flags.parse(argv, SPEC)


def test_required_flags_are_all_named():
    spec = [flags.Flag("model", required=True), flags.Flag("out", required=True)]
    with pytest.raises(UserError, match="--model, --out"):
        flags.parse([], spec)
    with pytest.raises(UserError, match="unknown flag --config.a"):
        flags.parse(["--config.a=1"], spec)


def test_help_names_every_flag_and_exits_0(capsys):
    with pytest.raises(SystemExit) as leave:
        flags.parse(["--steps=9", "--help"], SPEC, about="What it does.")
    out = capsys.readouterr().out
    assert leave.value.code == 0
    assert "What it does." in out and all(f"--{flag.name}" in out for flag in SPEC)


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (None, 0, ""),
        (UserError("no such cat"), 2, "error: no such cat\n"),
        (RestartError("lost"), 143, "error: lost\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            OSError(errno.ENOSPC, "No space"),
            2,
            "error: the output cannot be written: the disk is full\n",
        ),
    ],
)
def test_run_exit_codes(monkeypatch, capsys, raised, code, said):
    def main(argv):
        assert argv == ["--a"]
        if raised:
            raise raised

    monkeypatch.setattr(sys, "argv", ["program", "--a"])
    with pytest.raises(SystemExit) as leave:
        flags.run(main)
    assert leave.value.code == code
    assert capsys.readouterr().err == said
