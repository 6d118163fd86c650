"""The inverted index: finds items by the words of their texts, with BM25 and filters. The engine is Tantivy.

dpsr_tokenizer/analysis.py makes terms of texts. opensearch.py has the other engine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tantivy
from numpy.typing import NDArray

from dpsr_common.errors import CommandError
from dpsr_common.search_index import KEYWORD, TANTIVY, column_name, tantivy_schema
from dpsr_serving.gateway.catalogue import Catalogue, Condition
from dpsr_serving.gateway.found import MAX_K, Filters, Found, InvertedIndex, check_k
from dpsr_serving.gateway.opensearch import OpenSearchIndex
from dpsr_tokenizer.analysis import MAX_TERMS, Analysis, Field, fields_of

__all__ = [
    "MAX_K",
    "MAX_TERMS",
    "Analysis",
    "Field",
    "Found",
    "InvertedIndex",
    "TantivyIndex",
    "open_inverted_index",
    "tantivy_schema",
]


class TantivyIndex:
    """An inverted index in Tantivy, memory-mapped. Searches release the GIL."""

    def __init__(self, catalogue: Catalogue, directory: Path) -> None:
        """Opens the index of a catalogue. Raises CommandError if it cannot be opened."""
        self.catalogue = catalogue
        self._analysis = Analysis(fields_of(catalogue.manifest))
        try:
            with _with_lock_files(directory / TANTIVY) as path:
                index = tantivy.Index.open(str(path))
                self._schema, self._searcher = index.schema, index.searcher()
        except Exception as error:  # Tantivy raises ValueError, OSError, or its own errors
            raise CommandError(
                f"{directory / TANTIVY}: cannot be opened: {error}; run `dpsr index --inverted` again"
            ) from None
        if self._searcher.num_docs != catalogue.num_items:
            raise CommandError(
                f"{directory}: the index has {self._searcher.num_docs:,} items, the catalogue {catalogue.num_items:,}; "
                f"run `dpsr index --inverted` again"
            )
        self._columns = {name: column_name(i) for i, name in enumerate(catalogue.attributes)}

    def search(self, texts: Sequence[tuple[str, float]], k: int, filters: Filters = None) -> Found:
        """See InvertedIndex."""
        return self.prepare(texts, k, filters)()

    def prepare(self, texts: Sequence[tuple[str, float]], k: int, filters: Filters = None) -> Callable[[], Found]:
        """See InvertedIndex."""
        check_k(k)
        terms = self._analysis.terms(texts, self._is_known)
        if not terms:
            return Found.nothing
        query = tantivy.Query.boolean_query(
            [
                (
                    tantivy.Occur.Should,
                    tantivy.Query.boost_query(tantivy.Query.term_query(self._schema, field, token, "freq"), weight),
                )
                for (field, token), weight in terms.items()
            ]
        )
        conditions = filters if isinstance(filters, tuple) else self.catalogue.conditions(filters)
        if conditions:
            required = [tantivy.Query.const_score_query(self._condition(one), 0.0) for one in conditions]
            query = tantivy.Query.boolean_query([(tantivy.Occur.Must, part) for part in (query, *required)])
        return lambda: self._find(query, k)

    def _find(self, query: tantivy.Query, k: int) -> Found:
        try:
            hits = self._searcher.search(query, k, count=False).hits
            rows = self._searcher.fast_field_values("row", [address for _, address in hits])
        except (ValueError, OSError) as error:
            raise CommandError(f"the inverted index does not answer: {error}") from None
        scores = np.array([score for score, _ in hits], np.float32)
        return Found(self.catalogue.ids[np.array(rows, np.int64)], scores)

    def identifier(self, text: str) -> NDArray[np.int64]:
        """See InvertedIndex."""
        return self.catalogue.identifier(text)

    def tokens(self, text: str) -> list[str]:
        """See InvertedIndex."""
        return [token for _, token in self._analysis.terms([(text, 1.0)], self._is_known)]

    def _is_known(self, field: str, token: str) -> bool:
        return bool(self._searcher.doc_freq(field, token))

    def _condition(self, condition: Condition) -> Any:
        name, query = self._columns[condition.name], tantivy.Query
        attribute = self.catalogue.attributes[condition.name]
        if attribute.kind == KEYWORD:
            codes = [code for code in map(attribute.code, condition.texts) if code]
            parts = [query.term_query(self._schema, name, code) for code in codes]
        else:
            parts = [
                query.range_query(self._schema, name, tantivy.FieldType.Float, low, high)
                for low, high in condition.ranges
                if low <= high
            ]
        if not parts:
            return query.empty_query()
        return parts[0] if len(parts) == 1 else query.boolean_query([(tantivy.Occur.Should, part) for part in parts])


@contextlib.contextmanager
def _with_lock_files(path: Path) -> Iterator[Path]:
    """Gives a path at which Tantivy can open the index in `path`, also if this process may not write there.

    Tantivy makes a lock file beside the index whenever it opens one. A searcher has all its files mapped, so the path
    is only needed until there is one.
    """
    if os.access(path, os.W_OK):
        yield path
        return
    temporary = Path(tempfile.mkdtemp(prefix="dpsr-inverted-"))
    try:
        for file in path.iterdir():
            if file.suffix != ".lock":
                (temporary / file.name).symlink_to(file.resolve())
        yield temporary
    finally:
        # A thread of Tantivy may make its lock file while the directory is removed: then removing it fails once. It
        # makes none when the list of the index's files, meta.json, is gone.
        for _ in range(3):
            shutil.rmtree(temporary, ignore_errors=True)


def open_inverted_index(directory: Path) -> InvertedIndex:
    """Opens what `dpsr index --inverted` wrote: the catalogue and the engine that inverted.json names.

    Raises:
        CommandError: it is missing or damaged, or OpenSearch does not have the index.
    """
    catalogue = Catalogue.open(directory)
    if catalogue.manifest["engine"] == "opensearch":
        return OpenSearchIndex(catalogue)
    return TantivyIndex(catalogue, directory)
