"""`dpsr index --inverted`: writes the inverted index of a store, with its catalogue of attributes.

The directory holds

    inverted.json     the store that it was made from, the fields with boosts and analyzers, the attributes, the columns
                      of group and identifiers, and the sizes and checksums of the other files
    catalogue.dpsr    what searches show, filter, count and group items by (dpsr_serving/gateway/catalogue.py)
    tantivy/          the index, unless a server of OpenSearch holds it; dpsr_serving/gateway/inverted.py reads it
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import opensearchpy
import tantivy
from opensearchpy import helpers
from tqdm import tqdm

from dpsr_common import search_index
from dpsr_common.errors import CommandError, UsageError
from dpsr_common.packed_file import PackedFile, PackedFileWriter
from dpsr_common.search_index import KEYWORD, NUMBER, column_name, identifier_hash, tantivy_schema
from dpsr_export import item_attributes
from dpsr_tf.data.store import Store, new_directory, pack_strings, unpack_strings
from dpsr_tokenizer.analysis import Analysis, Field

# Bytes of memory in which Tantivy may collect items before it writes them: enough for one segment of a million items.
_HEAP = 1 << 30
# Seconds to wait for an answer of OpenSearch.
_LOAD_SECONDS = 60
_TANTIVY_VERSION = importlib.metadata.version("tantivy")
# Chosen on the dev folds of Home Depot (docs/search.md). Words that no item has are rare, so the letters cost little.
DEFAULT_ANALYSIS = "stem+typos=0.2"


def build(
    store: Store, out: Path, analysis: str = DEFAULT_ANALYSIS, overwrite: bool = False, opensearch: str = ""
) -> dict[str, Any]:
    """Writes the directory `out`. If it fails, no directory is written, and an earlier one stays.

    Args:
        store: has the texts, attributes, groups and identifiers of the items.
        out: the directory to write.
        analysis: options as the help of the flag --analysis describes them.
        overwrite: replaces an inverted index that is already there.
        opensearch: address of a server of OpenSearch or Elasticsearch that is to hold the index; "" is Tantivy.

    Returns:
        The content of inverted.json.

    Raises:
        UsageError: the options or the address are wrong.
        CommandError: the directory cannot be written, the store is damaged, or the server does not take the index.
    """
    fields = parse_analysis(analysis, _texts(store))
    items = store.schema.items
    if opensearch:
        search_index.check_opensearch_address(opensearch)
    if opensearch and any(field.unknown_words for field in fields):
        raise UsageError(f"--analysis={analysis}: typos cannot be combined with --opensearch; give trigrams=WEIGHT")
    with new_directory(out, overwrite, "inverted index", search_index.MANIFEST) as directory:
        _write_catalogue(directory / search_index.CATALOGUE, store)
        manifest: dict[str, Any] = {
            "format": search_index.FORMAT,
            "version": search_index.FORMAT_VERSION,
            "engine": "opensearch" if opensearch else "tantivy",
            **(_opensearch_names(opensearch) if opensearch else {"tantivy_version": _TANTIVY_VERSION}),
            "store": {
                "checksum": store.manifest["checksum"],
                "vocabulary_fingerprint": f"{store.vocabulary.fingerprint:016x}",
            },
            "items": store.counts.items,
            "fields": [dataclasses.asdict(field) for field in fields],
            "attributes": [{"name": attribute.key, "kind": attribute.kind} for attribute in items.filters],
            "group": items.group,
            "identifiers": list(items.identifiers),
        }
        columns = _Columns(directory / search_index.CATALOGUE, [attribute.key for attribute in items.filters])
        texts = tqdm(_documents(Analysis(fields), store), "index", store.counts.items)
        if opensearch:
            _write_opensearch(opensearch, manifest["index"], columns, fields, texts)
        else:
            _write_tantivy(directory / search_index.TANTIVY, columns, fields, texts)
        # Tantivy lets only the owner read some files. Its lock files are made by whoever opens the index.
        for path in directory.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.suffix != ".lock"]
        manifest["files"] = {path.relative_to(directory).as_posix(): search_index.file_record(path) for path in paths}
        (directory / search_index.MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def _opensearch_names(address: str) -> dict[str, str]:
    """Returns what the manifest says about a server: its address, without a password, and the name of a new index."""
    return {
        "address": search_index.shown_address(address),
        "index": f"dpsr-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}",
    }


def _texts(store: Store) -> dict[str, str]:
    """Returns column -> name in titles.dpsr, of the texts that the inverted index reads by default."""
    items = store.schema.items
    searched = {column: name for name, column in items.search_names.items() if name.startswith("searched")}
    return items.text_names | searched


def parse_analysis(text: str, texts: Mapping[str, str]) -> list[Field]:
    """Reads the options of --analysis.

    Args:
        text: options joined by +; "" for plain words.
        texts: column -> name in titles.dpsr, of the text columns.

    Raises:
        UsageError: an option is unknown, or a value is wrong.
    """
    where = f"--analysis={text}"
    words, simple, weights = "words", False, dict.fromkeys(("trigrams", "typos"), 0.0)
    columns: dict[str, float] = {}
    language = ""
    for option in text.split("+") if text else ():
        name, equals, value = option.partition("=")
        if name == "simple" and not equals:
            simple = True
        elif name == "stem" and bool(equals) == bool(value):
            language = value or "english"
        elif re.fullmatch(r"\d+(\.\d*)?|\.\d+", value) and float(value) > 0 and (name in weights or name in texts):
            (weights if name in weights else columns)[name] = float(value)
        else:
            known = ", ".join(f"{column}=WEIGHT" for column in texts)
            raise UsageError(
                f"{where}: has the option '{option}', expected stem, stem=LANGUAGE, simple, trigrams=WEIGHT, "
                f"typos=WEIGHT (weights above 0) or a text column: {known}"
            )
    if simple:
        words = f"simple:{language}" if language else "simple"
    elif language:
        words = f"stems:{language}"
    chosen = {column: texts[column] for column in columns or texts}
    if columns:
        fields = [Field(f"text{i}", (name,), words, columns[column]) for i, (column, name) in enumerate(chosen.items())]
    else:
        fields = [Field("text", tuple(chosen.values()), words)]
    for name, weight in weights.items():
        if weight:
            fields.append(Field(name, tuple(chosen.values()), "trigrams", weight, name == "typos"))
    try:
        Analysis(fields)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from None
    return fields


def _write_catalogue(path: Path, store: Store) -> None:
    """Writes catalogue.dpsr."""
    items, texts = store.items(), store.packed_texts()
    with PackedFileWriter(str(path), "catalogue") as file:
        file.add("id", items["id"])
        for name, source in (("key", items), ("title", texts)):
            for part in ("splits", "bytes"):
                if f"{name}.{part}" in source:
                    file.add(f"{name}.{part}", source[f"{name}.{part}"])
        if store.schema.items.filters:
            item_attributes.add_columns(file, item_attributes.columns(store, np.arange(len(items["id"]))))
        if store.schema.items.group is not None:
            names, codes = np.unique(np.array(_stripped(texts, "variants"), object), return_inverse=True)
            groups = codes.astype(np.int32)
            if len(names) and names[0] == "":  # the empty text is the first
                names, groups = names[1:], groups - 1
            splits, data = pack_strings(names.tolist())
            file.add("group", groups.astype(np.int32))
            file.add("group_text.splits", splits)
            file.add("group_text.bytes", data)
        hashes, rows = _identifiers(store, texts)
        file.add("identifier.hash", hashes)
        file.add("identifier.row", rows)


def _stripped(texts: PackedFile, name: str) -> list[str]:
    return [text.strip() for text in unpack_strings(texts, name)]


def _identifiers(store: Store, texts: PackedFile) -> tuple[np.ndarray, np.ndarray]:
    """Returns the hashes of all identifiers and keys, uint64 ascending, and the rows that have them, int32."""
    columns = [unpack_strings(texts, name) for name in store.schema.items.search_names if name.startswith("identifier")]
    keys = store.item_keys()
    pairs = {
        (hashed, row)
        for column in (*columns, *([keys] if keys is not None else []))
        for row, text in enumerate(column)
        if (hashed := identifier_hash(text)) is not None
    }
    ordered = sorted(pairs)
    return np.array([hashed for hashed, _ in ordered], np.uint64), np.array([row for _, row in ordered], np.int32)


class _Attribute:
    """An attribute in catalogue.dpsr, while the index is written."""

    def __init__(self, file: PackedFile, name: str) -> None:
        self.kind = KEYWORD if f"text.{name}.splits" in file else NUMBER
        self._values, self._splits = file[f"value.{name}"], file.get(f"splits.{name}")
        self._texts = unpack_strings(file, f"text.{name}") if self.kind == KEYWORD else []

    def numbers(self, row: int) -> list[Any]:
        """Returns the codes of an item, or its number; [] if it has none."""
        if self._splits is not None:
            return [code for code in self._values[self._splits[row] : self._splits[row + 1]].tolist() if code]
        value = self._values[row].item()
        return [value] if value == value and (value or self.kind == NUMBER) else []

    def texts(self, row: int) -> list[str]:
        """Returns the texts of an item."""
        return [self._texts[code - 1] for code in self.numbers(row)]


class _Columns:
    """The attributes in catalogue.dpsr.

    Attributes:
        attributes: name -> _Attribute, in the order of the schema.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        file = PackedFile(str(path), "catalogue", verify=False)
        self.attributes = {name: _Attribute(file, name) for name in names}


def _documents(analysis: Analysis, store: Store) -> Iterator[list[str]]:
    """Yields the tokens of each item in each field, joined by spaces."""
    file = store.packed_texts()
    names = list(dict.fromkeys(name for field in analysis.fields for name in field.texts))
    columns = {name: unpack_strings(file, name) for name in names}
    for row in range(store.counts.items):
        yield [
            " ".join(analysis.tokens(field, " ".join(columns[name][row] for name in field.texts)))
            for field in analysis.fields
        ]


def _write_tantivy(path: Path, columns: _Columns, fields: Sequence[Field], documents: Iterable[list[str]]) -> None:
    """Writes the Tantivy index."""
    path.mkdir()
    try:
        index = tantivy.Index(tantivy_schema(columns, fields), path=str(path))
        # One thread, so that the order of the documents is that of the rows: equal scores are then in order of ids.
        writer = index.writer(heap_size=_HEAP, num_threads=1)
        for row, document in enumerate(documents):
            entry = tantivy.Document()
            entry.add_unsigned("row", row)
            for field, tokens in zip(fields, document, strict=True):
                entry.add_text(field.name, tokens)
            for i, attribute in enumerate(columns.attributes.values()):
                add = entry.add_float if attribute.kind == NUMBER else entry.add_unsigned
                for value in attribute.numbers(row):
                    add(column_name(i), value)
            writer.add_document(entry)
        writer.commit()
        writer.wait_merging_threads()
    except (ValueError, OSError) as error:
        raise CommandError(f"{path}: Tantivy cannot write the index: {error}") from None


def _write_opensearch(
    address: str, name: str, columns: _Columns, fields: Sequence[Field], documents: Iterable[list[str]]
) -> None:
    """Makes an index in a server and writes all items to it. If it fails, the index is removed.

    Raises:
        CommandError: the server does not answer, or refuses the index or an item.
    """
    client = search_index.connect_opensearch(address, _LOAD_SECONDS)
    text = {"type": "text", "analyzer": "whitespace", "index_options": "freqs"}
    properties: dict[str, Any] = {"row": {"type": "integer"}} | {field.name: text for field in fields}
    for i, attribute in enumerate(columns.attributes.values()):
        properties[column_name(i)] = {"type": "keyword" if attribute.kind == KEYWORD else "double"}
    settings = {"number_of_shards": 1, "number_of_replicas": 0, "max_result_window": 10_000}
    body = {"settings": {"index": settings}, "mappings": {"dynamic": "strict", "properties": properties}}
    created = False
    try:
        client.indices.create(index=name, body=body)
        created = True
        actions = ({"_index": name, **action} for action in _actions(columns, fields, documents))
        helpers.bulk(client, actions, chunk_size=2000)
        client.indices.refresh(index=name)
    except BaseException as error:
        if created:
            client.indices.delete(index=name, ignore_unavailable=True)
        if isinstance(error, opensearchpy.exceptions.OpenSearchException):
            where, why = search_index.shown_address(address), search_index.opensearch_reason(error)
            raise CommandError(f"{where}: cannot make the index {name}: {why}") from None
        raise


def _actions(columns: _Columns, fields: Sequence[Field], documents: Iterable[list[str]]) -> Iterator[dict[str, Any]]:
    for row, tokens in enumerate(documents):
        source: dict[str, Any] = {"row": row}
        source |= {field.name: text for field, text in zip(fields, tokens, strict=True)}
        for i, attribute in enumerate(columns.attributes.values()):
            values = attribute.numbers(row) if attribute.kind == NUMBER else attribute.texts(row)
            if values:
                source[column_name(i)] = values[0] if len(values) == 1 else values
        yield {"_id": str(row), "_source": source}
