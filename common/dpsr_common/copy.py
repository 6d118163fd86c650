"""`dpsr copy`: copies a store, model, index or servable to or from an object store."""

from __future__ import annotations

from pathlib import Path

from absl import flags

from dpsr_common.errors import CommandError, UsageError, resource_error
from dpsr_common.object_store import download, is_remote, upload

USAGE = """
Usage: dpsr copy --from=DIR --to=s3://BUCKET/DIR [--overwrite]
       dpsr copy --from=s3://BUCKET/DIR --to=DIR

Copies a complete directory, such as a store, a model, an index or a version of a servable, to an object store (s3://,
gs://) or from one. The file dpsr_complete.json is written last. It lists all files with sizes and checksums, so no
command takes half of a directory.
"""

REQUIRED_FLAGS = ("from", "to")
REMOTE_PATHS = ("from", "to")


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of `dpsr copy`."""
    flags.DEFINE_string("from", None, "directory to copy", flag_values=values)
    flags.DEFINE_string("to", None, "directory that the copy makes", flag_values=values)
    flags.DEFINE_boolean(
        "overwrite", False, "replace the directory of --to if the object store has it already", flag_values=values
    )


def run(values: flags.FlagValues, arguments: list[str]) -> None:
    """Runs `dpsr copy`."""
    source, target = values["from"].value, values["to"].value
    if is_remote(source) == is_remote(target):
        raise UsageError(f"--from={source}, --to={target}: expected one of them, and only one, in an object store")
    if is_remote(target):
        if not Path(source).is_dir():
            raise UsageError(f"--from={source}: is not a directory")
        size = upload(Path(source), target, values.overwrite)
    else:
        if values.overwrite:
            raise UsageError(f"--overwrite: only for object stores; remove {target}, or choose another --to")
        try:
            size = sum(record["bytes"] for record in download(source, Path(target)).values())
        except OSError as error:
            raise resource_error(error, target) or CommandError(
                f"{error.filename or target}: cannot be written: {error.strerror}; choose another --to"
            ) from None
    print(f"{target}: {size / 1e6:.1f} MB")
