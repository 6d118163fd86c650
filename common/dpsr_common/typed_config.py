"""Configurations as typed dataclasses. Errors name the key, the value and what is allowed."""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import math
import re
import types
import typing
from typing import Any, TypeVar

import yaml

from dpsr_common.errors import UsageError

T = TypeVar("T")


def option(
    default: Any,
    help: str,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """Declares a dataclass field with its default, its help text and its allowed values.

    `minimum` and `maximum` are allowed themselves. For a tuple, the limits are those of its elements.
    """
    metadata = {"help": help, "minimum": minimum, "maximum": maximum, "choices": choices}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: default.copy(), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def read_assignment(assignment: str, example: str) -> tuple[str, Any]:
    """Reads the name and the YAML value of a flag `--set=name=value`.

    Args:
        assignment: the value of the flag, "name=value".
        example: an assignment for the error message. If it contains a dot, names are "section.key".

    Raises:
        UsageError: the name, its dot or the `=` is missing, or the value is not YAML.
    """
    name, equals, text = assignment.partition("=")
    dotted = "." in example
    if not name or not equals or (dotted and "." not in name):
        form = f"{'section.key' if dotted else 'name'}=value"
        raise UsageError(f"--set={assignment}: expected {form}, for example {example}")
    try:
        return name, yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        problem = getattr(error, "problem", None) or error
        raise UsageError(f"--set={assignment}: '{text}' is not valid YAML: {problem}") from None


def to_dict(value: Any) -> Any:
    """Turns a dataclass into plain dicts and lists, for YAML and JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_dict(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_dict(item) for key, item in value.items()}
    return [to_dict(item) for item in value] if isinstance(value, tuple) else value


def from_dict(cls: type[T], data: Any, where: str, check: bool = True) -> T:
    """Builds the dataclass `cls` from a mapping.

    Args:
        cls: the dataclass. It may have a method `problem`, which returns what is wrong with values that are each
            allowed but cannot be combined, or None.
            Two class variables are optional. SHORTHAND names a key: a text in place of the mapping is the value of that
            key. RENAMED maps a key of earlier versions to its new name and to the new names of values:
            {"own_negatives": ("own_negative_source", {"supervised": "labels"})}.
        data: the mapping. None, which an empty section of YAML gives, is a mapping without keys.
        where: the file and the section; errors begin with it.
        check: whether to call `problem`.

    Raises:
        UsageError: names the key, the value, and what is allowed.
    """
    data = {} if data is None else data
    shorthand = getattr(cls, "SHORTHAND", None)
    if shorthand is not None and isinstance(data, str):
        data = {shorthand: data}
    if not isinstance(data, dict):
        raise UsageError(f"{where}: is {data!r}, expected a section of `key: value` lines")
    types = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    renamed = getattr(cls, "RENAMED", {})
    for key in data:
        if key in renamed:
            name, values = renamed[key]
            value = values.get(data[key], data[key]) if isinstance(data[key], str) else data[key]
            raise UsageError(f"{where}: key '{key}' was renamed; write '{name}: {value}'")
        if key not in fields:
            near = difflib.get_close_matches(str(key), list(fields), 1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise UsageError(f"{where}: unknown key '{key}', expected one of {', '.join(fields)}{hint}")
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _convert(data[name], types[name], field, f"{where}: {name}", check)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UsageError(f"{where}: key '{name}' is missing{_help_of(field.metadata)}")
    result = cls(**values)
    problem = getattr(result, "problem", lambda: None)() if check else None
    if problem:
        raise UsageError(f"{where}: {problem}")
    return result


def _convert(value: Any, kind: Any, field: Any, where: str, check: bool) -> Any:
    metadata = field.metadata
    origin = typing.get_origin(kind)
    # A union is always an optional value.
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
        return _convert(value, kind, field, where, check)
    if dataclasses.is_dataclass(kind):
        return from_dict(kind, value, where, check)  # type: ignore[arg-type]
    if origin is tuple:
        element = typing.get_args(kind)[0]
        items = value if isinstance(value, list) else [value]
        if not items and field.default is dataclasses.MISSING:
            raise UsageError(f"{where} is [], expected at least one{_help_of(metadata)}")
        return tuple(_convert(item, element, field, where, check) for item in items)
    if origin is dict:
        if not isinstance(value, dict):
            raise UsageError(f"{where} is {value!r}, expected `key: value` lines{_help_of(metadata)}")
        element = typing.get_args(kind)[1]
        return {str(key): _convert(item, element, field, f"{where}: {key}", check) for key, item in value.items()}
    given = value
    if kind is float:
        value = _as_float(value)
    # YAML reads 2024-03-01 as a date.
    if kind is str and isinstance(value, datetime.date):
        value = value.isoformat()
    if kind is str and metadata.get("numbers") and type(value) in (int, float):
        value = str(value)
    if type(value) is not kind:
        raise UsageError(f"{where} is {value!r}, expected {_name(kind)}{_help_of(metadata)}")
    low, high, choices = metadata.get("minimum"), metadata.get("maximum"), metadata.get("choices")
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        bounds = f"{_shown(low)} or more" if high is None else f"{_shown(low)} to {_shown(high)}"
        raise UsageError(
            f"{where} is {given if value in (math.inf, -math.inf) else value!r}, expected {bounds}{_help_of(metadata)}"
        )
    if value != value:  # NaN
        raise UsageError(f"{where} is {given!r}, expected {_name(kind)}{_help_of(metadata)}")
    if choices and value not in choices:
        raise UsageError(f"{where} is {value!r}, expected one of {', '.join(choices)}")
    return value


def _as_float(value: Any) -> Any:
    """Returns a number as float, and any other value unchanged."""
    # For YAML 1.1, 1e-3 is a text, because it has no point.
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if is_number or (isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value)):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    return value


def _shown(bound: float) -> str:
    return f"{int(bound)}" if bound == int(bound) else f"{bound:g}"


def _name(kind: Any) -> str:
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[kind]


def _help_of(metadata: Any) -> str:
    return f" ({metadata['help']})" if metadata.get("help") else ""
