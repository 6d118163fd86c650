"""A small server that answers like OpenSearch. It is written from the published API and is no OpenSearch.

It has what dpsr_serving.gateway.opensearch sends: indices.create and delete, _bulk, _refresh, _count, and _search with
`bool`, `term`, `terms` and `range`, a filter, and a sort by score. Fields of type text are split at spaces and scored
by BM25 (k1 1.2, b 0.75). What it does not know it refuses with 400, as OpenSearch does.
"""

from __future__ import annotations

import collections
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class Index:
    """Documents in memory."""

    def __init__(self, properties: dict[str, Any]):
        self.types = {name: entry["type"] for name, entry in properties.items()}
        self.documents: dict[str, dict[str, Any]] = {}

    def add(self, name: str, document: dict[str, Any]) -> None:
        for field in document:
            if field not in self.types:
                raise Refused(400, f"strict_dynamic_mapping_exception: [{field}]")
        self.documents[name] = document

    def search(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        unknown = set(body) - {"size", "_source", "track_total_hits", "query", "sort"}
        if unknown:
            raise Refused(400, f"parsing_exception: unknown key {unknown}")
        hits = []
        for name, document in self.documents.items():
            score = self.score(body["query"], document)
            if score is not None:
                hits.append({"_id": name, "_score": score, "row": document["row"]})
        hits.sort(key=lambda hit: (-hit["_score"], hit["row"]))
        return hits[: body["size"]]

    def score(self, query: dict[str, Any], document: dict[str, Any]) -> float | None:
        """Returns the score of a document that matches, or None."""
        ((kind, clause),) = query.items()
        if kind == "bool":
            if any(self.score(one, document) is None for one in clause.get("filter", ())):
                return None
            found = [score for one in clause["should"] if (score := self.score(one, document)) is not None]
            return sum(found) if len(found) >= clause["minimum_should_match"] else None
        ((field, value),) = clause.items()
        if self.types[field] == "text":
            assert kind == "term"
            return self.bm25(field, value["value"], value["boost"], document)
        given = document.get(field)
        values = given if isinstance(given, list) else [given]
        if kind == "terms":
            return 0.0 if any(one in value for one in values if one is not None) else None
        if kind == "range":
            low, high = value.get("gte", -math.inf), value.get("lte", math.inf)
            return 0.0 if any(low <= one <= high for one in values if one is not None) else None
        raise Refused(400, f"parsing_exception: unknown query [{kind}]")

    def bm25(self, field: str, token: str, boost: float, document: dict[str, Any]) -> float | None:
        texts = [other[field].split() for other in self.documents.values()]
        words = document[field].split()
        count = collections.Counter(words)[token]
        if not count:
            return None
        frequency = sum(token in text for text in texts)
        idf = math.log(1 + (len(texts) - frequency + 0.5) / (frequency + 0.5))
        norm = 1.2 * (0.25 + 0.75 * len(words) * len(texts) / sum(map(len, texts)))
        return boost * idf * count * 2.2 / (count + norm)


class OpenSearchServer:
    """Listens on a free port of the loopback. `fail` makes it answer searches with this status."""

    def __init__(self) -> None:
        self.indices: dict[str, Index] = {}
        self.searches: list[dict[str, Any]] = []
        self.fail = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self) -> None:
                data = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
                try:
                    status, tree = 200, server.answer(self.command, self.path.partition("?")[0], data)
                except Refused as error:
                    status, tree = error.status, {"error": {"reason": str(error)}, "status": error.status}
                body = json.dumps(tree).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PUT = do_DELETE = _answer

            def log_message(self, *unused: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method: str, path: str, data: str) -> Any:
        name, _, action = path.strip("/").partition("/")
        if path == "/_bulk":
            return self.bulk(data)
        if method == "PUT" and not action:
            if name in self.indices:
                raise Refused(400, f"resource_already_exists_exception: [{name}]")
            self.indices[name] = Index(json.loads(data)["mappings"]["properties"])
            return {"acknowledged": True}
        if name not in self.indices:
            raise Refused(404, f"index_not_found_exception: no such index [{name}]")
        if method == "DELETE" and not action:
            del self.indices[name]
            return {"acknowledged": True}
        if action == "_refresh":
            return {}
        if action == "_count":
            return {"count": len(self.indices[name].documents)}
        if action == "_search":
            if self.fail:
                raise Refused(self.fail, "it was told to fail")
            self.searches.append(json.loads(data))
            return {"hits": {"hits": self.indices[name].search(self.searches[-1])}}
        raise Refused(400, f"no handler found for uri [{path}]")

    def bulk(self, data: str) -> Any:
        lines, items = iter(data.splitlines()), []
        for line in lines:
            entry = json.loads(line)["index"]
            try:
                self.indices[entry["_index"]].add(entry["_id"], json.loads(next(lines)))
                items.append({"index": {"_id": entry["_id"], "status": 201}})
            except Refused as error:
                items.append({"index": {"_id": entry["_id"], "status": 400, "error": {"reason": str(error)}}})
        return {"errors": any("error" in item["index"] for item in items), "items": items}
