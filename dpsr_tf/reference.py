"""Writes the configuration reference, docs/configuration.md, from the dataclasses that read the files.

python -m dpsr_tf.reference > docs/configuration.md
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from dpsr_tf.config import Config
from dpsr_tf.data.schema import Schema

_NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false"}
_HEAD = """# Configuration reference

This page lists all keys of the two files that you write: the config of a model, and the schema of a log. An unknown
key, a wrong type or a value out of range is an error that names the key, the value, and what is allowed.

```
python -m dpsr_tf.reference > docs/configuration.md   # writes this page; a test compares the two
```
"""


def reference() -> str:
    """Returns the page, in Markdown."""
    lines = [_HEAD]
    lines += [
        "## The config file\n",
        "One YAML file drives `dpsr train`, `dpsr index` and `dpsr export`. The flag `--set=section.key=value`",
        "of `dpsr train` and `dpsr index` overrides a value.",
        "[Training](training.md) and [choosing an index](index.md) explain how to choose values.\n",
    ]
    lines += _sections(Config, "")
    lines += [
        "## The schema file\n",
        "The schema tells `dpsr ingest` what your tables hold. [Your own log](data_format.md) has an example.\n",
    ]
    lines += _sections(Schema, "")
    return "\n".join(lines).rstrip() + "\n"


def _sections(cls: Any, where: str) -> list[str]:
    """Returns the table of a dataclass, followed by the tables of the dataclasses that its keys hold."""
    hints, rows, lines = typing.get_type_hints(cls), [], []
    for field in dataclasses.fields(cls):
        inner = _dataclass_of(hints[field.name])
        name = f"{where}{field.name}"
        if inner is not None:
            lines += _sections(inner, f"{name}[]." if _is_many(hints[field.name]) else f"{name}.")
        if inner is None or where:
            allowed = "see below" if inner is not None else _allowed(hints[field.name], field.metadata)
            text = str(field.metadata.get("help", "")).replace("|", "\\|")
            rows.append(f"| `{field.name}` | {_default(field)} | {allowed} | {text} |")
    head: list[str] = []
    if rows:
        title = where.rstrip(".") or "top level"
        head = [
            f"### `{title}`\n",
            f"{_first_sentence(cls)}\n",
            "| key | default | allowed values | meaning |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    return head + lines


def _dataclass_of(hint: Any) -> Any:
    candidates = [hint, *typing.get_args(hint)]
    return next((kind for kind in candidates if dataclasses.is_dataclass(kind)), None)


def _is_many(hint: Any) -> bool:
    return typing.get_origin(hint) in (tuple, dict)


def _first_sentence(cls: Any) -> str:
    return str(cls.__doc__).split("\n\n")[0].replace("\n    ", " ")


def _default(field: Any) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if dataclasses.is_dataclass(value):
        return ""
    if isinstance(value, bool):
        value = str(value).lower()
    if isinstance(value, tuple):
        value = list(value)
    return "" if value is None or value == "" else f"`{value}`"


def _allowed(hint: Any, metadata: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    many = _is_many(hint)
    element = typing.get_args(hint)[1 if typing.get_origin(hint) is dict else 0] if many else hint
    low, high, choices = metadata.get("minimum"), metadata.get("maximum"), metadata.get("choices")
    if choices:
        allowed = "one of " + ", ".join(f"`{choice}`" for choice in choices)
    else:
        allowed = _NAMES[element]
        if low is not None:
            allowed += f", {_number(low)} or more" if high is None else f", {_number(low)} to {_number(high)}"
    if many:
        allowed = f"{'`name: value` lines, each value: ' if typing.get_origin(hint) is dict else 'list of: '}{allowed}"
    return allowed


def _number(bound: float) -> str:
    return f"{int(bound):,}" if bound == int(bound) else f"{bound:g}"


if __name__ == "__main__":
    print(reference(), end="")
