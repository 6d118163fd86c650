"""The inverted index in OpenSearch or Elasticsearch, for those who run one.

The server sees tokens only: texts are analysed here, as for Tantivy, and sent joined by spaces to fields that split at
spaces. A query is a `bool` of `term` queries with boosts, so nothing that a user types is parsed. Attributes are fields
of type keyword and double, and conditions are `filter` clauses, which do not change scores.

`dpsr index --inverted --opensearch=URL` makes a new index in the server with each run, so that searches go on with the
old one. inverted.json says its name and the address. The environment variable DPSR_OPENSEARCH_URL overrides the
address, for example with a user and a password.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import opensearchpy
from numpy.typing import NDArray
from opensearchpy import helpers

from dpsr_common.errors import CommandError, UsageError
from dpsr_serving.gateway.analysis import Analysis, Field, Filters, Found, check_k, column_name, fields_of
from dpsr_serving.gateway.catalogue import KEYWORD, Catalogue, Condition

ADDRESS_VARIABLE = "DPSR_OPENSEARCH_URL"
# Seconds to wait for an answer when an index is made; of one search.
_LOAD_SECONDS, _SEARCH_SECONDS = 60, 2


class OpenSearchIndex:
    """An inverted index in a server that speaks the search API of OpenSearch. Thread-safe."""

    def __init__(self, catalogue: Catalogue) -> None:
        """Connects to the server. Raises CommandError if it has no index for this catalogue."""
        manifest = catalogue.manifest
        self.catalogue = catalogue
        self._analysis = Analysis(fields_of(manifest))
        self._index = manifest["index"]
        address = os.environ.get(ADDRESS_VARIABLE) or manifest["address"]
        self._client = connect(address, _SEARCH_SECONDS)
        self._columns = {name: column_name(i) for i, name in enumerate(catalogue.attributes)}
        try:
            count = self._client.count(index=self._index)["count"]
        except opensearchpy.exceptions.OpenSearchException as error:
            raise CommandError(
                f"{_shown(address)}: has no index {self._index} that answers: {_reason(error)}"
            ) from None
        if count != catalogue.num_items:
            raise CommandError(
                f"{_shown(address)}: index {self._index} has {count:,} items, the catalogue {catalogue.num_items:,}; "
                f"run `dpsr index --inverted` again"
            )

    def search(self, texts: Sequence[tuple[str, float]], k: int, filters: Filters = None) -> Found:
        """See InvertedIndex."""
        check_k(k)
        terms = self._analysis.terms(texts, lambda field, token: True)
        if not terms:
            return Found.nothing()
        conditions = filters if isinstance(filters, tuple) else self.catalogue.conditions(filters)
        should = [{"term": {field: {"value": token, "boost": weight}}} for (field, token), weight in terms.items()]
        body = {
            "size": k,
            "_source": False,
            "track_total_hits": False,
            "query": {
                "bool": {
                    "should": should,
                    "minimum_should_match": 1,
                    "filter": [self._condition(one) for one in conditions],
                }
            },
            "sort": [{"_score": "desc"}, {"row": "asc"}],
        }
        try:
            hits = self._client.search(index=self._index, body=body)["hits"]["hits"]
            rows = np.array([int(hit["_id"]) for hit in hits], np.int64)
            scores = np.array([hit["_score"] for hit in hits], np.float32)
            return Found(self.catalogue.ids[rows], scores)
        except opensearchpy.exceptions.OpenSearchException as error:
            raise CommandError(f"OpenSearch does not answer: {_reason(error)}") from None
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise CommandError(f"OpenSearch gives an answer that is not one of a search: {error!r}") from None

    def identifier(self, text: str) -> NDArray[np.int64]:
        """See InvertedIndex."""
        return self.catalogue.identifier(text)

    def tokens(self, text: str) -> list[str]:
        """See InvertedIndex."""
        return [token for _, token in self._analysis.terms([(text, 1.0)], lambda field, token: True)]

    def _condition(self, condition: Condition) -> dict[str, Any]:
        name = self._columns[condition.name]
        if self.catalogue.attributes[condition.name].kind == KEYWORD:
            return {"terms": {name: list(condition.texts)}}
        ranges = []
        for low, high in condition.ranges:
            ends = {"gte": low, "lte": high}
            ranges.append({"range": {name: {end: value for end, value in ends.items() if np.isfinite(value)}}})
        return {"bool": {"should": ranges, "minimum_should_match": 1}}


def check_address(address: str) -> None:
    """Raises UsageError unless an address has the form http://HOST:PORT."""
    if not address.startswith(("http://", "https://")):
        raise UsageError(f"OpenSearch at {_shown(address)}: expected an address such as http://127.0.0.1:9200")


def connect(address: str, seconds: float) -> Any:
    """Returns a client for a server. Raises UsageError for a wrong address."""
    check_address(address)
    return opensearchpy.OpenSearch([address], timeout=seconds, max_retries=1, retry_on_timeout=False)


def load(
    address: str, name: str, catalogue: Catalogue, fields: Sequence[Field], documents: Iterator[Sequence[str]]
) -> None:
    """Makes an index and writes all items to it. If it fails, the index is removed.

    Args:
        address: of the server.
        name: of the index, which must not exist.
        catalogue: the items.
        fields: the fields of their texts.
        documents: of each item, the tokens of each field, joined by spaces.

    Raises:
        UsageError: the address is wrong.
        CommandError: the server does not answer, or refuses the index or an item.
    """
    client = connect(address, _LOAD_SECONDS)
    text = {"type": "text", "analyzer": "whitespace", "index_options": "freqs"}
    properties: dict[str, Any] = {"row": {"type": "integer"}} | {field.name: text for field in fields}
    for i, attribute in enumerate(catalogue.attributes.values()):
        properties[column_name(i)] = {"type": "keyword" if attribute.kind == KEYWORD else "double"}
    settings = {"number_of_shards": 1, "number_of_replicas": 0, "max_result_window": 10_000}
    body = {"settings": {"index": settings}, "mappings": {"dynamic": "strict", "properties": properties}}
    created = False
    try:
        client.indices.create(index=name, body=body)
        created = True
        actions = ({"_index": name, **action} for action in _actions(catalogue, fields, documents))
        helpers.bulk(client, actions, chunk_size=2000)
        client.indices.refresh(index=name)
    except BaseException as error:
        if created:
            client.indices.delete(index=name, ignore_unavailable=True)
        if isinstance(error, opensearchpy.exceptions.OpenSearchException):
            raise CommandError(f"{_shown(address)}: cannot make the index {name}: {_reason(error)}") from None
        raise


def _actions(
    catalogue: Catalogue, fields: Sequence[Field], documents: Iterator[Sequence[str]]
) -> Iterator[dict[str, Any]]:
    for row, tokens in enumerate(documents):
        source: dict[str, Any] = {"row": row}
        source |= {field.name: text for field, text in zip(fields, tokens, strict=True)}
        for i, attribute in enumerate(catalogue.attributes.values()):
            value = attribute.value(row)
            if value is not None:
                source[column_name(i)] = value
        yield {"_id": str(row), "_source": source}


def _shown(address: str) -> str:
    """Returns an address without user and password."""
    scheme, _, rest = address.rpartition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}" if scheme else rest


def _reason(error: Exception) -> str:
    status = getattr(error, "status_code", None)
    return f"{type(error).__name__}{f' ({status})' if status else ''}: {str(error)[:300]}"
