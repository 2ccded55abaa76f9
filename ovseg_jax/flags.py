"""The command line of every entry point: named flags, and overrides of a Python config file.

A mistake is one line that names the nearest right spelling, and exit code 2. This is why it is not
`ml_collections.config_flags`, which answers with tracebacks, has no None for a number, cannot set a
field of a phase that the file leaves out, and silently reads words=a,b as the one word "a,b".
"""

import ast
import contextlib
import difflib
import errno
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from ml_collections import ConfigDict

from ovseg_jax.errors import UserError

_KEY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*|\[\d+\])*")
_STEP = re.compile(r"([A-Za-z_]\w*)|\[(\d+)\]")
# Fields, by the last name of their keys, that are a number or None.
OPTIONAL = ("scale", "threshold", "layer_scale", "start")


@dataclass(frozen=True)
class Flag:
    """One named flag: `--name=value`. `type` turns the text into the value."""

    name: str
    type: Callable[[str], Any] = str
    default: Any = None
    help: str = ""
    required: bool = False
    choices: tuple[str, ...] = ()


def comma_list(text: str) -> list[str]:
    """'a, b,c' -> ['a', 'b', 'c']; a flag type. Empty entries are dropped."""
    return [part.strip() for part in text.split(",") if part.strip()]


def nearest(word: str, choices: Sequence[str]) -> str:
    """The end of an error message: which of `choices` the reader may have meant."""
    matches = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


# ---- config files


def read_config(spec: str | Path) -> ConfigDict:
    """What `get_config(variant)` of the file 'path/to/file.py' or 'path/to/file.py:variant' gives.

    What the file leaves out is filled in by `train.config.load_config`.

    Raises:
      UserError: no such file, one that cannot be imported, no `get_config`, or no such variant.
    """
    name, is_python, variant = str(spec).partition(".py:")
    path = Path(name + ".py" if is_python else name)
    where = f"config file {str(path)!r}"
    if not path.is_file():
        beside = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UserError(f"{where} does not exist{nearest(str(path), beside)}")
    module_spec = importlib.util.spec_from_file_location(f"ovseg_config_{path.stem}", path)
    if module_spec is None:
        raise UserError(f"{where} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except (SyntaxError, ImportError, UnicodeDecodeError) as error:
        raise UserError(f"{where} cannot be imported: {error}") from error
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise UserError(f"{where} has no function get_config(variant)")
    try:
        config = get_config(variant)
    except (UserError, ValueError) as error:
        raise UserError(f"config {str(spec)!r}: {error}") from error
    except (TypeError, AttributeError, KeyError) as error:  # a field that the base does not name
        cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"config {str(spec)!r}: {cause}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"config {str(spec)!r}: get_config returned no ConfigDict")
    return config


def filled(
    given: Mapping[str, Any] | ConfigDict,
    defaults: Mapping[str, Any],
    where: str,
    drop: bool = False,
) -> dict[str, Any]:
    """The defaults, with what is given in their place, group by group; `where` is their key.

    Raises:
      UserError: a field that no default has, unless `drop` leaves such out.
    """
    full = dict(defaults)
    for key, value in given.items():
        if key not in defaults:
            if drop:
                continue
            raise UserError(f"{where}.{key} is no field{nearest(key, list(defaults))}")
        if defaults[key] and isinstance(defaults[key], Mapping):
            if not isinstance(value, Mapping | ConfigDict):
                raise UserError(f"{where}.{key} is {value!r}, but has fields of its own")
            value = filled(value, defaults[key], f"{where}.{key}", drop)
        full[key] = value
    return full


def paths(config: Any, prefix: str = "") -> Iterator[str]:
    """Every key that can be set, as it is written on the command line: 'phases[1].steps'."""
    fields: dict[str, Any] = {}
    if isinstance(config, ConfigDict | dict):
        fields = {f"{prefix}.{key}" if prefix else str(key): config[key] for key in config}
    elif isinstance(config, list | tuple):
        fields = {f"{prefix}[{i}]": item for i, item in enumerate(config)}
    for path, value in fields.items():
        yield path
        yield from paths(value, path)


def apply_override(config: ConfigDict, key: str, text: str) -> None:
    """Set `key` ('phases[1].steps') of `config`, in place, to what `text` says.

    The value is read as a Python literal, else as a string, and must fit the type of the present
    value: an int may fill a float, a list a tuple. The fields in `OPTIONAL` take a number or None;
    elsewhere anything fits where the present value is None. A field that a record in a tuple, such
    as a phase, does not have is set, and whoever reads the record refuses what is no field.

    Raises:
      UserError: an unknown key (with the nearest right one), or a value of another type.
    """
    if not _KEY.fullmatch(key):
        raise UserError(f"config key {key!r} is not of the form a.b[0].c")
    steps = [name or int(index) for name, index in _STEP.findall(key)]
    _replace(config, steps, text, config, key)


def _replace(node: Any, steps: list[str | int], text: str, config: ConfigDict, key: str) -> Any:
    """`node` with the value at `steps` replaced; tuples are rebuilt, the rest changed in place."""
    if not steps:
        return _convert(text, node, key)
    step, *rest = steps
    if isinstance(step, str):
        known = isinstance(node, ConfigDict | dict) and step in node
    else:
        known = isinstance(node, list | tuple) and step < len(node)
    if type(node) is dict and isinstance(step, str) and not known and not rest:
        node[step] = _literal(text)
        return node
    if not known:
        raise UserError(f"unknown config key {key!r}{nearest(key, list(paths(config)))}")
    value = _replace(node[step], rest, text, config, key)
    if isinstance(node, tuple):
        return (*node[:step], value, *node[step + 1 :])
    node[step] = value
    return node


def _convert(text: str, present: Any, key: str) -> Any:
    """`text` as a value of the type of `present`; see `apply_override`. `key` is for the error."""
    if isinstance(present, ConfigDict | dict):
        raise UserError(f"config key {key!r} is a group of settings: set one of {sorted(present)}")
    value = _literal(text)
    if isinstance(present, bool) and not isinstance(value, bool):
        raise UserError(f"config key {key!r} is true or false, not {text!r}")
    # Not where it is a range, as the scale of crops is.
    if isinstance(present, int | float | None) and key.rpartition(".")[2] in OPTIONAL:
        if value is None:
            return None
        present = 0.0 if present is None else present
    if isinstance(present, str):
        return value if isinstance(value, str) else text
    words = isinstance(present, list | tuple) and all(isinstance(item, str) for item in present)
    if words and isinstance(value, str):
        value = comma_list(text)
    try:
        return _fit(value, present)
    except (TypeError, OverflowError) as error:
        raise UserError(f"config key {key!r}: {text!r} is not {error}") from None


def _literal(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _fit(value: Any, present: Any) -> Any:
    """`value` as the type of `present`; TypeError says in words what was expected."""
    if present is None:
        return value
    kind = type(present).__name__
    if isinstance(present, list | tuple):
        if not isinstance(value, list | tuple):
            raise TypeError(f"a {kind} such as {present!r}")
        if len({type(item) for item in present}) == 1:  # alike, so new ones must be like them
            value = [_fit(item, present[0]) for item in value]
        return type(present)(value)
    if isinstance(present, float) and type(value) in (int, float):
        if not math.isfinite(value):
            raise TypeError("a finite number")
        return float(value)
    if type(value) is type(present):
        return value
    raise TypeError(
        f"{'an' if kind[0] in 'aeiou' else 'a'} {kind} (the present value is {present!r})"
    )


# ---- flags


def parse(argv: Sequence[str], spec: Sequence[Flag], about: str = "") -> SimpleNamespace:
    """Read `--flag=value` and `--flag value`; a flag given twice keeps its last value.

    Where `spec` has a flag named config, `--config.a.b=value` is collected in `overrides`, as
    (key, text) pairs for `apply_override`. The name in the result has _ for -.

    Raises:
      UserError: an unknown flag, a value that is missing or of another type, a missing flag.
    """
    known = {flag.name: flag for flag in spec}
    given, overrides, rest = {}, [], list(argv)
    while rest:
        argument = rest.pop(0)
        if argument in ("--help", "-h"):
            print(usage(spec, about))
            sys.exit(0)
        if not argument.startswith("--"):
            raise UserError(f"unexpected argument {argument!r}: flags are written --flag=value")
        name, equals, text = argument[2:].partition("=")
        is_override = "config" in known and name.startswith("config.")
        if not is_override and name not in known:
            names = [f"--{flag}" for flag in (*known, "help")]
            raise UserError(f"unknown flag --{name}{nearest('--' + name, names)}")
        if not equals and not is_override and known[name].type is bool:
            text = "true"
        elif not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"flag --{name} needs a value: --{name}=VALUE")
            text = rest.pop(0)
        if is_override:
            overrides.append((name.removeprefix("config."), text))
        else:
            given[name] = _flag_value(known[name], text)
    missing = [f"--{flag.name}" for flag in spec if flag.required and flag.name not in given]
    if missing:
        raise UserError(f"missing {', '.join(missing)} (--help lists every flag)")
    values = {name.replace("-", "_"): given.get(name, flag.default) for name, flag in known.items()}
    return SimpleNamespace(**values, overrides=overrides)


def _flag_value(flag: Flag, text: str) -> Any:
    if flag.choices and text not in flag.choices:
        raise UserError(f"flag --{flag.name} is one of {', '.join(flag.choices)}; not {text!r}")
    if flag.type is bool:
        value = _literal(text)
        if not isinstance(value, bool):
            raise UserError(f"flag --{flag.name} is true or false, not {text!r}")
        return value
    try:
        value = flag.type(text)
    except ValueError as error:
        raise UserError(
            f"flag --{flag.name}: {text!r} is not a valid {flag.type.__name__}"
        ) from error
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"flag --{flag.name}: {text!r} is not a finite number")
    return value


def usage(spec: Sequence[Flag], about: str = "") -> str:
    """What --help prints."""
    lines = [about.strip(), ""] if about.strip() else []
    lines.append("Flags:")
    for flag in spec:
        kind = "|".join(flag.choices) or flag.type.__name__.upper()
        note = "required" if flag.required else f"default {flag.default!r}"
        lines.append(f"  --{flag.name}={kind}\n      {flag.help} ({note})")
        if flag.name == "config":
            lines.append("  --config.KEY=VALUE\n      set one key of the config, e.g. a.b[0].c")
    return "\n".join(lines)


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Call `main` with the arguments of the process and exit: 0, or what it returns.

    The error's own code (2, or `errors.RESTART`) after a UserError, printed as 'error: ...' without
    a traceback; 130 after Ctrl-C, 141 where the reader of our output has gone (``| head``), and 2
    where the output cannot be written.
    """
    try:
        try:
            code = main(sys.argv[1:])
        finally:
            if sys.stdout is not None:
                # A broken pipe or a full disk shows here, and not after the last line of Python.
                sys.stdout.flush()
    except BrokenPipeError:
        _discard_output(sys.stdout, sys.stderr)
        code = 141
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        _discard_output(sys.stdout)
        print("error: the output cannot be written: the disk is full", file=sys.stderr)
        code = 2
    sys.exit(code or 0)


def _discard_output(*streams: Any) -> None:
    """Python writes what is left in these streams at its end, which would fail once more."""
    for stream in filter(None, streams):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
