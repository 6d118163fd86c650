"""Data sets known by name, for `dpsr ingest --adapter=NAME`. docs/adapters.md says what each set is.

An adapter is an entry point of the group "dpsr.adapters": a module NAME.py with its schema NAME.yaml beside it. Where
the published files are not plain tables, the module has

    convert(source: Path, out: Path) -> None

which streams the published files of the directory `source` into plain tables in the existing, empty directory `out`;
the schema names these tables.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple

from dpsr_common.errors import UsageError

GROUP = "dpsr.adapters"


class Adapter(NamedTuple):
    """How a data set becomes a store."""

    schema_path: Path
    convert: Callable[[Path, Path], None] | None  # None: the schema reads the published files themselves


def open_adapter(name: str) -> Adapter:
    """The adapter of a data set. Raises UsageError for a name that nobody has registered."""
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in found:
        raise UsageError(
            f"no adapter '{name}', expected one of: {', '.join(sorted(found))}; for other data write a schema file"
        )
    module = found[name].load()
    return Adapter(Path(module.__file__).with_suffix(".yaml"), getattr(module, "convert", None))
