"""Strict YAML: a key that is given twice is an error, and every error names the file, the key and the value.

`read_yaml` reads a file for `dpsr_common.typed_config`. A package that checks its file by hand, without dataclasses,
reads it with `read_file` and `load_yaml`, and takes its values out of a `Section`.
"""

from __future__ import annotations

import codecs
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dpsr_common.errors import UsageError

T = TypeVar("T")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads the mapping in a YAML file; an empty file is {}.

    Raises:
        UsageError: the file is missing, cannot be read, or does not hold a YAML mapping. Names the file.
    """
    return read_file(path, _load_mapping)


def read_file(path: str | Path, parse: Callable[[str], T]) -> T:
    """Returns what `parse` makes of the text of a YAML file.

    Raises:
        UsageError: the file cannot be read, or `parse` raised UsageError. Names the file.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file, expected a YAML file") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}; expected a YAML file") from None
    try:
        return parse(_decode(data))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def load_yaml(text: str, lines: bool = False) -> Any:
    """Returns the value that a YAML text stands for; {} for an empty text.

    Args:
        text: the text.
        lines: whether mappings remember the lines of their keys, which the errors of a Section then name.

    Raises:
        UsageError: the text is not YAML.
    """
    try:
        tree = yaml.load(text, Loader=_LineLoader if lines else _StrictLoader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        raise UsageError(f"not valid YAML: {error}") from error
    return {} if tree is None else tree


def _load_mapping(text: str) -> dict[str, Any]:
    tree = load_yaml(text)
    if not isinstance(tree, dict):
        raise UsageError(f"holds a {type(tree).__name__}, expected `key: value` lines")
    return tree


def _decode(data: bytes) -> str:
    """Decodes the bytes of a YAML file, which are UTF-8, or UTF-16 with a byte order mark."""
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if is_utf16 else "utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"not valid YAML: {error}") from error


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is given twice. PyYAML itself silently keeps the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            # The keys that a merge (`<<: *other`) brings along may be given again.
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    "while reading a section", node.start_mark, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _LinedMapping(dict[Any, Any]):
    """A mapping of a file. `lines` holds the line of each key, and of the mapping itself under None."""

    lines: dict[Any, int]


class _LineLoader(_StrictLoader):
    """Makes mappings that remember the lines of their keys."""

    def construct_lined_mapping(self, node: yaml.MappingNode) -> Iterator[_LinedMapping]:
        mapping = _LinedMapping()
        mapping.lines = {None: node.start_mark.line + 1}
        yield mapping
        mapping.update(self.construct_mapping(node))
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                mapping.lines[self.construct_object(key_node)] = key_node.start_mark.line + 1


_LineLoader.add_constructor("tag:yaml.org,2002:map", _LineLoader.construct_lined_mapping)


class Section:
    """One mapping of a configuration file, with typed readers of its values.

    A reader returns `default` if the key is not there. It raises UsageError for a value that is not allowed; the error
    names the key, the value and what is expected.

    Attributes:
        tree: the mapping itself.
        key: what errors write before the name of one of its keys: "models.demo." or, for the whole file, "".
    """

    def __init__(self, key: str, tree: Any, allowed: tuple[str, ...]) -> None:
        """Raises UsageError if `tree` is not a mapping or has a key that is not in `allowed`.

        `key` is the path of the section in the file ("models.demo"); it is empty for the whole file.
        """
        where = key or "the configuration"
        if not isinstance(tree, dict):
            raise UsageError(f"{where}: got {tree!r}, expected a mapping with the keys {', '.join(allowed)}")
        for name in tree:
            if name not in allowed:
                line = _line_of(tree, name)
                raise UsageError(f"{line}{where}: unknown key {name!r}, allowed: {', '.join(allowed)}")
        self.key = f"{key}." if key else ""
        self.tree = tree

    def error(self, name: str, words: str) -> UsageError:
        """Returns the error for the value of a key; `words` say what was given and what is expected."""
        return UsageError(f"{_line_of(self.tree, name)}{self.key}{name}: {words}")

    def section(self, name: str, allowed: tuple[str, ...]) -> Section:
        """Returns the section below a key; an empty one if the key is not there."""
        value = self.tree.get(name, {})
        if not isinstance(value, dict):
            raise self.error(name, f"got {value!r}, expected a mapping with the keys {', '.join(allowed)}")
        return Section(f"{self.key}{name}", value, allowed)

    def text(self, name: str, default: T, check: Callable[[str], bool] = bool, words: str = "") -> str | T:
        """Reads a string that is not empty and passes `check`. `words` say in the error what is expected."""
        return self.value(
            name,
            default,
            lambda value: isinstance(value, str) and bool(value) and check(value),
            words or "a string that is not empty (quote it)",
        )

    def flag(self, name: str, default: bool) -> bool:
        """Reads true or false."""
        return bool(self.value(name, default, lambda value: isinstance(value, bool), "true or false"))

    def integer(self, name: str, default: T, least: int, most: int = 2**63 - 1) -> int | T:
        """Reads an integer of at least `least` and at most `most`."""
        given = self.tree.get(name)
        is_above = isinstance(given, int) and given > most
        return self.value(
            name,
            default,
            lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most,
            f"an integer of at least {least}" + (f" and at most {most}" if is_above else ""),
        )

    def number(
        self, name: str, default: T, below: float = 0, most: float = math.inf, least: float | None = None
    ) -> float | T:
        """Reads a finite number above `below`, or of at least `least` if that is given, and at most `most`."""
        limit = f"above {below:g}" if least is None else f"of at least {least:g}"

        def valid(value: Any) -> bool:
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            # math.isfinite() raises an error for an integer of 400 digits.
            is_finite = is_number and abs(value) <= sys.float_info.max
            return is_finite and (value > below if least is None else value >= least) and value <= most

        return self.value(
            name, default, valid, f"a number {limit}" if most == math.inf else f"a number {limit} and at most {most:g}"
        )

    def value(self, name: str, default: T, valid: Callable[[Any], bool], words: str) -> Any | T:
        """Reads a value for which `valid` is true. `words` say in the error what is expected."""
        if name not in self.tree:
            return default
        value = self.tree[name]
        if not valid(value):
            raise self.error(name, f"got {value!r}, expected {words}")
        return value


def _line_of(tree: Any, name: Any) -> str:
    """Returns "line 7: " for a key of a mapping that remembers lines, else "". A missing key has its mapping's line."""
    lines = getattr(tree, "lines", {})
    line = lines.get(name, lines.get(None))
    return "" if line is None else f"line {line}: "
