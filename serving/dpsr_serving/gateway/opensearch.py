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
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import opensearchpy
from numpy.typing import NDArray

from dpsr_common.errors import CommandError
from dpsr_common.search_index import KEYWORD, column_name, connect_opensearch, opensearch_reason, shown_address
from dpsr_serving.gateway.catalogue import Catalogue, Condition
from dpsr_serving.gateway.found import Filters, Found, check_k
from dpsr_tokenizer.analysis import Analysis, fields_of

ADDRESS_VARIABLE = "DPSR_OPENSEARCH_URL"
# Seconds to wait for an answer.
_SEARCH_SECONDS = 2


class OpenSearchIndex:
    """An inverted index in a server that speaks the search API of OpenSearch. Thread-safe."""

    def __init__(self, catalogue: Catalogue) -> None:
        """Connects to the server. Raises CommandError if it has no index for this catalogue."""
        manifest = catalogue.manifest
        self.catalogue = catalogue
        self._analysis = Analysis(fields_of(manifest))
        self._index = manifest["index"]
        address = os.environ.get(ADDRESS_VARIABLE) or manifest["address"]
        self._client = connect_opensearch(address, _SEARCH_SECONDS)
        self._columns = {name: column_name(i) for i, name in enumerate(catalogue.attributes)}
        try:
            count = self._client.count(index=self._index)["count"]
        except opensearchpy.exceptions.OpenSearchException as error:
            raise CommandError(
                f"{shown_address(address)}: has no index {self._index} that answers: {opensearch_reason(error)}"
            ) from None
        if count != catalogue.num_items:
            raise CommandError(
                f"{shown_address(address)}: index {self._index} has {count:,} items, the catalogue "
                f"{catalogue.num_items:,}; run `dpsr index --inverted` again"
            )

    def search(self, texts: Sequence[tuple[str, float]], k: int, filters: Filters = None) -> Found:
        """See InvertedIndex."""
        return self.prepare(texts, k, filters)()

    def prepare(self, texts: Sequence[tuple[str, float]], k: int, filters: Filters = None) -> Callable[[], Found]:
        """See InvertedIndex."""
        check_k(k)
        terms = self._analysis.terms(texts, lambda field, token: True)
        if not terms:
            return Found.nothing
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
        return lambda: self._find(body)

    def _find(self, body: dict[str, Any]) -> Found:
        try:
            hits = self._client.search(index=self._index, body=body)["hits"]["hits"]
            rows = np.array([int(hit["_id"]) for hit in hits], np.int64)
            scores = np.array([hit["_score"] for hit in hits], np.float32)
            return Found(self.catalogue.ids[rows], scores)
        except opensearchpy.exceptions.OpenSearchException as error:
            raise CommandError(f"OpenSearch does not answer: {opensearch_reason(error)}") from None
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
