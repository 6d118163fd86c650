"""Manifests of indexes and servables: their formats, and the checksums of files that they hold. No TensorFlow."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from dpsr_common.errors import CommandError

# Of index.json.
FORMAT = "dpsr-index"
FORMAT_VERSION = 3
# Of a servable: path in the directory of a version, and format.
MANIFEST = "assets.extra/dpsr_manifest.json"
MANIFEST_FORMAT, MANIFEST_VERSION = "dpsr-servable", 2


def file_record(path: Path) -> dict[str, Any]:
    """Returns size and SHA-256 of a file, in the form of index.json."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def check_files(
    directory: Path, manifest: dict[str, Any], name: str = "index.json", made_by: str = "dpsr index"
) -> None:
    """Checks sizes and checksums of the files of a directory against its manifest. Raises CommandError.

    Args:
        directory: the directory.
        manifest: content of its manifest.
        name: name of the manifest's file.
        made_by: the command that makes such directories.
    """
    for file, expected in manifest["files"].items():
        path = directory / file
        try:
            found = file_record(path)
        except OSError as error:
            raise CommandError(f"{path}: cannot be read: {error.strerror}; run `{made_by}` again") from None
        for key, value in expected.items():
            if found[key] != value:
                raise CommandError(f"{path}: {key} is {found[key]}, but {name} says {value}; run `{made_by}` again")
