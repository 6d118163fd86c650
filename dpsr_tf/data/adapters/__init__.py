"""Ready schemas for public data sets: `dpsr ingest --adapter=NAME`. docs/adapters.md describes each data set.

An adapter is an entry point of the group "dpsr.adapters": a module NAME.py with its schema NAME.yaml beside it. If the
published files are not plain tables, the module has a function

    convert(source: Path, out: Path) -> None

which reads the published files in the directory `source` piece by piece, and writes plain tables into the existing,
empty directory `out`. The schema names these tables.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import NamedTuple

from dpsr_common.errors import UsageError

GROUP = "dpsr.adapters"


class Adapter(NamedTuple):
    """The schema and the converter of a data set."""

    schema_path: Path
    # None if the schema reads the published files themselves.
    convert: Callable[[Path, Path], None] | None


def open_adapter(name: str) -> Adapter:
    """Returns the adapter of a data set. Raises UsageError for a name that is not registered."""
    registered = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in registered:
        raise UsageError(
            f"--adapter={name}: expected one of {', '.join(sorted(registered))}; for other data write a schema file"
        )
    module = registered[name].load()
    return Adapter(Path(module.__file__).with_suffix(".yaml"), getattr(module, "convert", None))
