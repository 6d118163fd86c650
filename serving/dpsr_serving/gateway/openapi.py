"""The description of the REST API that GET /v1/openapi.json answers: OpenAPI 3.1."""

from __future__ import annotations

from typing import Any

_TEXT = {"type": "string"}
_TEXTS = {"type": "array", "items": _TEXT}
_INTEGER = {"type": "integer"}
_NUMBER = {"type": "number"}
_ITEM_ID = {"oneOf": [_INTEGER, _TEXT], "description": "An item's id, or its key where the shop's ids are texts."}


def _object(properties: dict[str, Any], required: tuple[str, ...] = (), strict: bool = False) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        schema["required"] = list(required)
    return {**schema, "additionalProperties": False} if strict else schema


def _map(schema: Any, description: str) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": schema, "description": description}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _said(schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {**schema, "description": description}


_SCHEMAS: dict[str, Any] = {
    "SearchRequest": _object(
        {
            "query": _said(_TEXT, "What the user typed. It can be left out with a cursor."),
            "user": _ref("User"),
            "pipeline": _said(_TEXT, "Name of a pipeline. Default: the one that the configuration says."),
            "arm": _said(_TEXT, "An arm of the pipeline's experiment, for testers."),
            "filters": _map(_ref("Filter"), "Conditions that every item meets, by attribute."),
            "facets": _said(_TEXTS, "Attributes whose values are counted over the whole list."),
            "size": {"type": "integer", "minimum": 1, "default": 20, "description": "Items on a page."},
            "cursor": _said(_TEXT, "next_cursor of the page before."),
            "explain": {
                "type": "boolean",
                "default": False,
                "description": "Whether to say how the answer came about.",
            },
        },
        strict=True,
    ),
    "User": _object(
        {
            "id": {"oneOf": [_INTEGER, _TEXT]},
            "features": _map({}, "Values of the schema's user features: texts, numbers, or lists of them."),
            "clicked_items": {"type": "array", "items": _ITEM_ID, "description": "Oldest first."},
            "clicked_item_types": _said(_TEXTS, "click, cart or order, one for each clicked item."),
            "past_queries": _said(_TEXTS, "Oldest first."),
        },
        strict=True,
    ),
    "Filter": {
        "description": "A value, alternatives, or a range that includes both ends.",
        "oneOf": [
            _TEXT,
            _NUMBER,
            {"type": "array", "minItems": 1, "items": {"oneOf": [_TEXT, _NUMBER]}},
            _object({"min": _NUMBER, "max": _NUMBER}, strict=True),
        ],
    },
    "SearchResponse": _object(
        {
            "query": _TEXT,
            "pipeline": _said(_TEXT, "The pipeline that answered."),
            "arm": _said(_TEXT, "experiment/arm that the request was assigned to, or empty."),
            "total": _said(_INTEGER, "Items on all pages."),
            "items": {"type": "array", "items": _ref("Item")},
            "facets": _map(_ref("Facet"), "By attribute."),
            "next_cursor": _said(_TEXT, "Send it as cursor for the next page. Empty on the last page."),
            "degraded": _said(_TEXTS, "Stages that were left out, because they failed or were late."),
            "rewrites": _said(_TEXTS, "Rewritten queries that were looked up too."),
            "explain": _ref("Explanation"),
        },
        ("query", "pipeline", "arm", "total", "items", "facets", "next_cursor", "degraded", "rewrites"),
    ),
    "Item": _object(
        {
            "id": _INTEGER,
            "key": {"type": ["string", "null"], "description": "The shop's own id, if that is a text."},
            "title": _TEXT,
            "attributes": _map({"oneOf": [_TEXT, _TEXTS, _NUMBER]}, "By name, without those that the item lacks."),
            "score": {"type": ["number", "null"], "description": "Null for an item that only a rule put there."},
            "group": {"type": ["string", "null"], "description": "The product of which the item is a variant."},
            "variants": _said(_INTEGER, "Items of the list that this one stands for, itself included."),
            "sources": _said(_TEXTS, "What found the item."),
            "explain": _map({}, "With explain: ranks and scores by source, coarse, fine, rerank."),
        },
        ("id", "key", "title", "attributes", "score", "group", "variants", "sources"),
    ),
    "Facet": {
        "oneOf": [
            _object(
                {
                    "kind": {"const": "keyword"},
                    "values": {
                        "type": "array",
                        "items": _object({"value": _TEXT, "count": _INTEGER}, ("value", "count")),
                    },
                    "more": _said(_INTEGER, "Values that are left out."),
                },
                ("kind", "values", "more"),
            ),
            _object(
                {
                    "kind": {"const": "number"},
                    "min": {"type": ["number", "null"]},
                    "max": {"type": ["number", "null"]},
                },
                ("kind", "min", "max"),
            ),
        ]
    },
    "Explanation": _object(
        {
            "stages": {
                "type": "array",
                "items": _object(
                    {"name": _TEXT, "in": _INTEGER, "out": _INTEGER, "ms": _NUMBER, "error": _TEXT},
                    ("name", "in", "out", "ms"),
                ),
            },
            "tokens": _said(_TEXTS, "Words that the inverted index looks up."),
            "heads": _map({"type": "array", "items": _INTEGER}, "By semantic source: items that each head found."),
            "cut_off": _said(_INTEGER, "Items whose score was too low."),
            "identifier": {"type": "boolean", "description": "Whether the query is the identifier of an item."},
        },
        ("stages", "tokens", "heads", "cut_off", "identifier"),
    ),
    "Pipelines": _object(
        {
            "pipelines": {
                "type": "array",
                "items": _object({"name": _TEXT, "stages": _TEXTS, "arms": _TEXTS}, ("name", "stages", "arms")),
            },
            "default": _TEXT,
            "attributes": {
                "type": "array",
                "items": _object({"name": _TEXT, "kind": _TEXT, "values": _TEXTS}, ("name", "kind")),
            },
            "user_features": {
                "type": "array",
                "items": _object({"name": _TEXT, "kind": _TEXT}, ("name", "kind")),
            },
        },
        ("pipelines", "default", "attributes", "user_features"),
    ),
    "Error": _object({"error": _TEXT}, ("error",)),
}


def _answer(description: str, schema: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": _ref(schema)}}}


def _text(description: str) -> dict[str, Any]:
    return {"description": description, "content": {"text/plain": {"schema": _TEXT}}}


OPENAPI: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {"title": "DPSR search", "version": "1", "description": "The search gateway; docs/search.md explains it."},
    "paths": {
        "/v1/search": {
            "post": {
                "summary": "Answers a search.",
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": _ref("SearchRequest")}},
                },
                "responses": {
                    "200": _answer("The items of a page, best first.", "SearchResponse"),
                    "400": _answer("The request is wrong.", "Error"),
                    "408": _answer("The body did not arrive in time.", "Error"),
                    "413": _answer("The body is larger than the limit.", "Error"),
                    "415": _answer("The body is of another type than JSON.", "Error"),
                    "500": _answer("An error of the gateway.", "Error"),
                    "503": _answer("No source of recall answered, or too many searches are under way.", "Error"),
                },
            }
        },
        "/v1/pipelines": {
            "get": {
                "summary": "Lists pipelines, attributes and user features.",
                "responses": {"200": _answer("What requests can name.", "Pipelines")},
            }
        },
        "/v1/openapi.json": {
            "get": {"summary": "This description.", "responses": {"200": {"description": "OpenAPI 3.1."}}}
        },
        "/v1/judgments": {
            "get": {
                "summary": "The judgments of a query by hand. Only with --page and --judgments.",
                "parameters": [{"name": "query", "in": "query", "required": True, "schema": _TEXT}],
                "responses": {"200": {"description": "Grades by item."}},
            },
            "post": {
                "summary": "Saves a judgment by hand. Only with --page and --judgments.",
                "responses": {"200": {"description": "Saved."}, "400": _answer("The judgment is wrong.", "Error")},
            },
        },
        "/healthz": {"get": {"summary": "Whether the process lives.", "responses": {"200": _text("ok")}}},
        "/readyz": {
            "get": {
                "summary": "Whether new searches are answered.",
                "responses": {"200": _text("ok"), "503": _text("The gateway is about to stop.")},
            }
        },
        "/metrics": {
            "get": {"summary": "Metrics for Prometheus.", "responses": {"200": _text("Prometheus' text format.")}}
        },
    },
    "components": {"schemas": _SCHEMAS},
}
