"""Retrievers for evaluation that search an index or a servable in this process, without a server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from dpsr_common.errors import CommandError
from dpsr_common.packed_file import FormatError, PackedFile
from dpsr_export import ann
from dpsr_export.export import versions
from dpsr_export.index_files import FORMAT, FORMAT_VERSION, MANIFEST
from dpsr_export.warmup import LoadedServable
from dpsr_tf.data.store import Store, read_manifest
from dpsr_tf.data.user_requests import HISTORY, USER, User, UserRequests
from dpsr_tf.evaluation.corpus import Corpus
from dpsr_tf.evaluation.retriever import Retriever
from dpsr_tf.models.encoders import is_personal, query_encoder
from dpsr_tf.models.exact_search import ExactSearch, no_results
from dpsr_tf.models.model_directory import ModelDirectory

_BATCH = 64


def index_system(corpus: Corpus, directory: str) -> Retriever:
    """Makes the system `--system=index:DIR`: the query tower of the index's model, and FAISS.

    The tower reads users from the store. Pairs of query and item are scored with the exact item embeddings, which are
    in the index directory.

    Raises:
        UsageError: the corpus has no store.
        CommandError: the directory has no index, or the index cannot be read.
    """
    return _Index(Path(directory), corpus.need_store(f"index:{directory}"))


def servable_system(corpus: Corpus, directory: str) -> Retriever:
    """Makes the system `--system=servable:DIR`. DIR is a version directory, or a base path with versions.

    Of a base path the highest version is used. Requests contain the user features that the store knows, like the
    requests of a shop. This system does not score pairs.

    Raises:
        UsageError: the corpus has no store.
        CommandError: the directory has no servable, the servable cannot be read, or the store lacks one of its inputs.
    """
    return _Servable(Path(directory), corpus.need_store(f"servable:{directory}"))


class _Index:
    """A retriever with the query tower of the checkpoint that the index was made from, and FAISS."""

    def __init__(self, directory: Path, store: Store):
        manifest = read_manifest(directory / "index.json", FORMAT, FORMAT_VERSION, "dpsr index")
        self._encode = query_encoder(manifest["model"], store, manifest["checkpoint"])
        model = ModelDirectory.open(manifest["model"])
        self.personal, self.validated = is_personal(model.config.model), model.validated
        try:
            embeddings = PackedFile(str(directory / "item_embeddings.dpsr"), "item_embeddings")
            self._item_ids = PackedFile(str(directory / "item_ids.dpsr"), "item_ids")["id"]
            self._index = faiss.read_index(str(directory / "items.faiss"))
            self._entries = manifest.get("entries", 1)
            if manifest["parameters"]:
                faiss.ParameterSpace().set_index_parameters(self._index, manifest["parameters"])
        except (FormatError, FileNotFoundError, RuntimeError) as error:
            raise CommandError(f"{str(error).splitlines()[-1]}; run `dpsr index` again") from None
        vectors = embeddings["embedding"].reshape(-1, manifest["embedding_dim"])
        self._exact = ExactSearch(self._encode, embeddings["id"], vectors)

    def __call__(self, queries: Sequence[str], users: Sequence[User] | None, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See Retriever. The k items of each head are united; an item's score is its largest inner product."""
        ids, scores = no_results(len(queries), k)
        for begin in range(0, len(queries), _BATCH):
            heads = self._encode(queries[begin : begin + _BATCH], users[begin : begin + _BATCH] if users else None)
            batch, _, dim = heads.shape
            products, rows = ann.search(self._index, np.ascontiguousarray(heads.reshape(-1, dim)), k, self._entries)
            products, rows = products.reshape(batch, -1), rows.reshape(batch, -1)
            there = (rows >= 0) & np.repeat(heads.any(axis=2), k, axis=1)
            for row in range(batch):
                items = self._item_ids[rows[row][there[row]]]
                found, largest = ann.unite_heads(items, products[row][there[row]], k)
                ids[begin + row, : len(found)], scores[begin + row, : len(found)] = found, largest
        return ids, scores

    def score(self, queries: Sequence[str], users: Sequence[User] | None, items: np.ndarray) -> np.ndarray:
        """See Retriever. Uses the exact embeddings, not the index's codes."""
        return self._exact.score(queries, users, items)


class _Servable:
    """A retriever with the signature `search` of a SavedModel. Its requests contain the store's user features."""

    def __init__(self, directory: Path, store: Store):
        path = directory
        if not (directory / "saved_model.pb").is_file():
            there = [number for number in versions(directory) if (directory / str(number) / "saved_model.pb").is_file()]
            if not there:
                raise CommandError(f"{directory}: holds no servable (no saved_model.pb); write one with `dpsr export`")
            path = directory / str(there[-1])
        self._servable = LoadedServable(path)
        if "search" not in self._servable.inputs:
            raise CommandError(f"{path}: has no signature `search`; give a servable that `dpsr export` wrote")
        names = self._servable.inputs["search"]
        self.personal = any(name.startswith(USER) or name in HISTORY for name in names)
        self._users = UserRequests(store, names) if self.personal else None
        manifest = path / MANIFEST
        config = json.loads(manifest.read_text())["config"] if manifest.is_file() else {}
        self.validated = config.get("validation", {}).get("queries", 0) > 0

    def __call__(self, queries: Sequence[str], users: Sequence[User] | None, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See Retriever."""
        ids, scores = no_results(len(queries), k)
        for begin in range(0, len(queries), _BATCH):
            requests: list[dict[str, Any]] = [{"query": query} for query in queries[begin : begin + _BATCH]]
            if self._users is not None and users is not None:
                asking = users[begin : begin + _BATCH]
                requests = [request | self._users.of(user) for request, user in zip(requests, asking, strict=True)]
            found = self._servable("search", self._servable.search_inputs(requests, k))
            end = begin + len(requests)
            ids[begin:end], scores[begin:end] = found["item_ids"], found["scores"]
        return ids, scores
