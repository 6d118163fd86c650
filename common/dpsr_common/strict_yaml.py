"""YAML files, read strictly: a key given twice is an error, and every error names the file, the key and the value."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dpsr_common.errors import UsageError

T = TypeVar("T")


def read_file(path: Path, parse: Callable[[str], T]) -> T:
    """Reads a configuration file. Raises UsageError that names the file, also in the errors of `parse`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot read the configuration: {error}") from error
    try:
        return parse(text)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; {} for an empty file. Raises UsageError if there is none."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file, expected a YAML file") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        tree = load_yaml(data)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: holds a {type(tree).__name__}, expected `key: value` lines")
    return tree


def load_yaml(text: str | bytes) -> Any:
    """What the YAML text says; {} for an empty text. Raises UsageError."""
    try:
        tree = yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bad UTF-8, or a date that does not exist
        raise UsageError(f"not valid YAML: {error}") from error
    return {} if tree is None else tree


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is given twice. PyYAML itself silently keeps the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = str(self.construct_object(key_node, deep=True))
            if key_node.tag != "tag:yaml.org,2002:merge" and key in seen:
                raise yaml.constructor.ConstructorError(
                    "while reading a section", node.start_mark, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class Section:
    """A mapping of the file with its key, and readers of its values that raise UsageError, naming key and value.

    A reader returns `default` where the key is not there.
    """

    def __init__(self, key: str, tree: Any, allowed: tuple[str, ...]) -> None:
        if not isinstance(tree, dict):
            raise UsageError(f"{key}: got {tree!r}, expected a mapping with the keys {', '.join(allowed)}")
        for name in tree:
            if name not in allowed:
                raise UsageError(f"{key}: unknown key {name!r}, allowed: {', '.join(allowed)}")
        self.key = "" if key == "the configuration" else f"{key}."
        self.tree = tree

    def section(self, name: str, allowed: tuple[str, ...]) -> Section:
        """The mapping below a key, empty where there is none."""
        return Section(f"{self.key}{name}", self.tree.get(name, {}), allowed)

    def text(self, name: str, default: T, check: Callable[[str], bool] = bool, words: str = "") -> str | T:
        """A string that is not empty and passes `check`; `words` say what is expected."""
        return self.value(
            name,
            default,
            lambda value: isinstance(value, str) and bool(value) and check(value),
            words or "a string that is not empty (quote it)",
        )

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        return bool(self.value(name, default, lambda value: isinstance(value, bool), "true or false"))

    def integer(self, name: str, default: T, least: int) -> int | T:
        """An integer of at least `least`."""
        return self.value(
            name,
            default,
            lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least,
            f"an integer of at least {least}",
        )

    def number(self, name: str, default: T, below: float = 0, most: float = math.inf) -> float | T:
        """A number above `below` and at most `most`."""
        limit = f"above {below:g}" if most == math.inf else f"above {below:g} and at most {most:g}"
        return self.value(
            name,
            default,
            lambda value: (
                isinstance(value, (int, float))
                and not isinstance(value, bool)
                and below < value <= most
                and math.isfinite(value)
            ),
            f"a number {limit}",
        )

    def value(self, name: str, default: T, valid: Callable[[Any], bool], words: str) -> Any | T:
        """Whatever is `valid`."""
        if name not in self.tree:
            return default
        value = self.tree[name]
        if not valid(value):
            raise UsageError(f"{self.key}{name}: got {value!r}, expected {words}")
        return value
