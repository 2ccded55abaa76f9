"""Evaluation protocols by name, and what others have scored under them.

Each file of ``protocols/`` has a title, the source of its settings, in what it differs from that
source, and the settings: fields of `Protocol`. ``published_results.json`` has mIoU of published
models, each row with its source and the protocols under which its authors computed it.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from ovseg_jax.errors import UserError
from ovseg_jax.flags import nearest
from ovseg_jax.segmentation.protocol import Protocol

NAMES = ("paper", "released", "groupvit", "tcl", "sclip")
_FIELDS = tuple(field.name for field in dataclasses.fields(Protocol) if field.name != "name")


@functools.cache
def _document(file: str) -> dict[str, Any]:
    path = resources.files("ovseg_jax.segmentation") / file
    return json.loads(path.read_text(encoding="utf-8"))


def file_digest(package: str, file: str) -> str:
    """First digits of the SHA-256 of a data file of the package."""
    return hashlib.sha256((resources.files(package) / file).read_bytes()).hexdigest()[:12]


def named_protocol(name: str) -> Protocol:
    """The protocol called `name`.

    Raises:
      UserError: there is none.
    """
    if name not in NAMES:
        raise UserError(
            f"unknown protocol {name!r}{nearest(name, list(NAMES))}; there are: {', '.join(NAMES)}"
        )
    return Protocol.from_config({**_document(f"protocols/{name}.json")["settings"], "name": name})


def protocol_notes(name: str) -> dict[str, str]:
    """Title, source and difference of a named protocol, for reports; {} for one of another name."""
    if name not in NAMES:
        return {}
    document = _document(f"protocols/{name}.json")
    return {key: document[key] for key in ("title", "source", "differs")}


def is_named(protocol: Protocol, benchmark: str, own_scale: bool = False) -> bool:
    """Whether results under `protocol` may stand beside published ones of the protocol it names.

    Args:
      protocol: as it was for the benchmark.
      own_scale: its scale is the model's, where the named one leaves the scale to the model.
    """
    if protocol.name not in NAMES:
        return False
    named = named_protocol(protocol.name).for_benchmark(benchmark)
    skipped = {"scale"} if own_scale and named.scale is None else set()
    # Benchmarks without background have no threshold.
    skipped |= {"threshold"} if protocol.threshold is None else set()
    return all(
        getattr(protocol, field) == getattr(named, field)
        for field in _FIELDS
        if field not in skipped
    )


def published_rows(protocol: str, benchmark: str) -> list[Mapping[str, Any]]:
    """Rows of ``published_results.json`` with a score on the benchmark under the protocol."""
    rows = _document("published_results.json")["rows"]
    return [row for row in rows if protocol in row["protocols"] and benchmark in row["miou"]]
