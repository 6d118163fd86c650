"""The files of an inverted index, as `dpsr index --inverted` writes them and `dpsr search` reads them.

inverted.json      the manifest
catalogue.dpsr     what searches show, filter, count and group items by (dpsr_serving/gateway/catalogue.py)
tantivy/           the index, unless a server of OpenSearch holds it
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpsr_common.errors import UsageError
from dpsr_common.packed_file import checksum

FORMAT, FORMAT_VERSION = "dpsr-inverted", 1
MANIFEST, CATALOGUE, TANTIVY = "inverted.json", "catalogue.dpsr", "tantivy"
KEYWORD, NUMBER = "keyword", "number"
# A query that is shorter, or has no digit, is never taken for an identifier.
SHORTEST_IDENTIFIER = 4


def column_name(place: int) -> str:
    """Returns the name in Tantivy of the attribute with this place among the attributes."""
    return f"attribute{place}"


def tantivy_schema(catalogue: Any, fields: Sequence[Any]) -> Any:
    """Returns the schema of Tantivy for the items of a catalogue.

    Args:
        catalogue: has `attributes`, name -> an object whose `kind` is KEYWORD or NUMBER.
        fields: the fields of the texts, which have a `name`.
    """
    import tantivy

    builder = tantivy.SchemaBuilder()
    builder.add_unsigned_field("row", fast=True)
    for field in fields:
        builder.add_text_field(field.name, tokenizer_name="whitespace", index_option="freq")
    for i, attribute in enumerate(catalogue.attributes.values()):
        if attribute.kind == KEYWORD:
            builder.add_unsigned_field(column_name(i), indexed=True)
        else:
            builder.add_float_field(column_name(i), fast=True)
    return builder.build()


def identifier_hash(text: str) -> int | None:
    """Returns a hash of 64 bits of a normalised identifier; None if the text cannot be one."""
    normal = "".join(filter(str.isalnum, unicodedata.normalize("NFKC", text).casefold()))
    if len(normal) < SHORTEST_IDENTIFIER or not any(map(str.isdigit, normal)):
        return None
    return int.from_bytes(hashlib.blake2b(normal.encode("utf-8", "replace"), digest_size=8).digest(), "little")


def file_record(path: Path) -> dict[str, Any]:
    """Returns the size and checksum of a file, as the manifest holds them."""
    data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
    return {"bytes": path.stat().st_size, "xxh3": f"{checksum(data):016x}"}


def check_opensearch_address(address: str) -> None:
    """Raises UsageError unless an address has the form http://HOST:PORT."""
    if not address.startswith(("http://", "https://")):
        raise UsageError(f"OpenSearch at {shown_address(address)}: expected an address such as http://127.0.0.1:9200")


def connect_opensearch(address: str, seconds: float) -> Any:
    """Returns a client for a server. Raises UsageError for a wrong address."""
    check_opensearch_address(address)
    import opensearchpy

    return opensearchpy.OpenSearch([address], timeout=seconds, max_retries=1, retry_on_timeout=False)


def shown_address(address: str) -> str:
    """Returns an address without user and password."""
    scheme, _, rest = address.rpartition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}" if scheme else rest


def opensearch_reason(error: Exception) -> str:
    """Returns what an error of the client says, in one line."""
    status = getattr(error, "status_code", None)
    return f"{type(error).__name__}{f' ({status})' if status else ''}: {str(error)[:300]}"
