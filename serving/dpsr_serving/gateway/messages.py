"""Requests to the search gateway and its answers, and their form in JSON. docs/search.md lists every field."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import orjson

from dpsr_serving.search import Filter, User

T = TypeVar("T")

# Limits of one request that protect the process and that no operator has a reason to change.
MAX_VALUES = 1000  # values of one filter, clicked items, past queries, numbers of one feature
MAX_NAMES = 64  # filters, facets and user features
MAX_TEXT = 1000  # characters of a name or a value
MAX_CURSOR = 2**17  # characters of a cursor, which holds up to 5,000 items


class RequestError(ValueError):
    """A request that cannot be answered: what was given and what is expected."""


@dataclasses.dataclass(frozen=True)
class SearchRequest:
    """One search.

    Attributes:
        query: what the user typed.
        user: what is known about the user; an empty User for an anonymous one.
        user_id: the user's id, a number or a text; None: unknown. It decides the arm of an experiment, and a ranker
            looks up what the user has spent.
        pipeline: name of a pipeline, or of a pipeline with an experiment; "" for the default.
        arm: names the arm of the pipeline's experiment directly, for testers; "" for the arm of the user.
        filters: conditions that every item meets: attribute -> a value, a list of alternatives, or a range of numbers
            (low, high) that includes both ends, with None for an open end.
        facets: attributes whose values are to be counted.
        size: number of items on a page.
        cursor: `next_cursor` of the page before; "" for the first page.
        explain: whether to say how the answer came about.
    """

    query: str
    user: User = dataclasses.field(default_factory=User)
    user_id: int | str | None = None
    pipeline: str = ""
    arm: str = ""
    filters: Mapping[str, Filter] = dataclasses.field(default_factory=dict)
    facets: tuple[str, ...] = ()
    size: int = 20
    cursor: str = ""
    explain: bool = False

    @classmethod
    def from_json(cls, body: bytes | str) -> SearchRequest:
        """Reads the body of a request. Raises RequestError."""
        return cls.from_dict(load_json(body))

    @classmethod
    def from_dict(cls, tree: Any) -> SearchRequest:
        """Reads the fields of a request. Raises RequestError."""
        fields = _Fields("", tree, _REQUEST)
        if "query" not in fields.tree and not fields.tree.get("cursor"):
            raise RequestError("query: is missing; expected a text")
        user = _Fields("user", fields.tree.get("user") or {}, _USER)
        return cls(
            query=fields.read("query", "", _text),
            user=User(
                features=user.read("features", {}, _features),
                clicked_items=user.read("clicked_items", (), _list_of(_item)),
                past_queries=user.read("past_queries", (), _list_of(_text)),
                clicked_item_types=user.read("clicked_item_types", (), _list_of(_text)),
            ),
            user_id=user.read("id", None, _item),
            pipeline=fields.read("pipeline", "", _text),
            arm=fields.read("arm", "", _text),
            filters=fields.read("filters", {}, read_filters),
            facets=tuple(fields.read("facets", (), _list_of(_name, MAX_NAMES))),
            size=fields.read("size", 20, _size),
            cursor=fields.read("cursor", "", _cursor),
            explain=fields.read("explain", False, _flag),
        )


@dataclasses.dataclass(slots=True)
class Item:
    """An item of an answer.

    Attributes:
        id: the item's id in the store.
        key: the shop's own id if that is a text, else None.
        title: the item's title.
        attributes: attribute -> a text, a list of texts, or a number; without those that the item lacks.
        score: of the last stage that ranked the list. The higher, the better, within one answer.
        group: the key of the product whose variants collapsed into this item, or None.
        variants: number of items of the list that are variants of this product, this one included.
        sources: what found the item: names of recall sources, and "identifier" if the query is its identifier.
        explain: with `explain`, ranks and scores by stage: {source: {"rank", "score"}, "coarse": score,
            "fine": score or None, "rerank": [reason, ...]}. Ranks begin at 1.
    """

    id: int
    title: str
    score: float
    key: str | None = None
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    group: str | None = None
    variants: int = 1
    sources: tuple[str, ...] = ()
    explain: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the form in JSON."""
        tree: dict[str, Any] = {
            "id": self.id,
            "key": self.key,
            "title": self.title,
            "attributes": self.attributes,
            "score": rounded(self.score),
            "group": self.group,
            "variants": self.variants,
            "sources": self.sources,
        }
        if self.explain is not None:
            tree["explain"] = self.explain
        return tree


@dataclasses.dataclass(frozen=True)
class Facet:
    """Values of an attribute over all items of the list, on all pages.

    Attributes:
        kind: "keyword" or "number".
        values: of a keyword: (value, number of items), the most frequent first.
        minimum, maximum: of a number; None if no item has the attribute.
        more: number of values that are left out.
    """

    kind: str
    values: Sequence[tuple[str, int]] = ()
    minimum: float | None = None
    maximum: float | None = None
    more: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Returns the form in JSON."""
        if self.kind == "number":
            return {"kind": self.kind, "min": self.minimum, "max": self.maximum}
        values = [{"value": value, "count": count} for value, count in self.values]
        return {"kind": self.kind, "values": values, "more": self.more}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a request.

    Attributes:
        name: "rewrite", "recall.SOURCE", "coarse", "fine", "rerank".
        items_in, items_out: items before and after it. For "rewrite", queries.
        ms: milliseconds that it took; stages of recall run at the same time.
        error: why the stage was left out, or "".
    """

    name: str
    items_in: int
    items_out: int
    ms: float
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Returns the form in JSON."""
        tree = {"name": self.name, "in": self.items_in, "out": self.items_out, "ms": round(self.ms, 3)}
        return {**tree, "error": self.error} if self.error else tree


@dataclasses.dataclass(frozen=True)
class Explanation:
    """How an answer came about.

    Attributes:
        stages: in the order of the pipeline.
        tokens: the query's words as the inverted index looks them up.
        heads: semantic source -> number of its items by the head of the query tower that found them.
        cut_off: items that coarse ranking left out because their score was too low.
        identifier: whether the query is the identifier of an item.
    """

    stages: Sequence[Stage] = ()
    tokens: Sequence[str] = ()
    heads: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    cut_off: int = 0
    identifier: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Returns the form in JSON."""
        return {
            "stages": [stage.to_dict() for stage in self.stages],
            "tokens": self.tokens,
            "heads": self.heads,
            "cut_off": self.cut_off,
            "identifier": self.identifier,
        }


@dataclasses.dataclass(frozen=True)
class SearchResponse:
    """The answer to a request.

    Attributes:
        query: the query.
        pipeline: the pipeline that answered.
        total: number of items in the list, on all pages.
        items: the items of this page, best first.
        facets: attribute -> Facet, for the attributes that the request names.
        next_cursor: what to send as `cursor` for the next page; "" on the last one.
        degraded: stages that were left out because they failed or were late: "rewrite", "recall.SOURCE", "coarse",
            "fine", "rerank".
        rewrites: the rewritten queries that were looked up too.
        explain: with `explain`, how the answer came about; None on pages after the first.
        arm: "experiment/arm" that the request was assigned to, or "".
    """

    query: str
    pipeline: str
    total: int = 0
    items: Sequence[Item] = ()
    facets: Mapping[str, Facet] = dataclasses.field(default_factory=dict)
    next_cursor: str = ""
    degraded: Sequence[str] = ()
    rewrites: Sequence[str] = ()
    explain: Explanation | None = None
    arm: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Returns the form in JSON."""
        tree: dict[str, Any] = {
            "query": self.query,
            "pipeline": self.pipeline,
            "arm": self.arm,
            "total": self.total,
            "items": [item.to_dict() for item in self.items],
            "facets": {name: facet.to_dict() for name, facet in self.facets.items()},
            "next_cursor": self.next_cursor,
            "degraded": list(self.degraded),
            "rewrites": list(self.rewrites),
        }
        if self.explain is not None:
            tree["explain"] = self.explain.to_dict()
        return tree

    def to_json(self) -> bytes:
        """Returns the body of the answer."""
        return orjson.dumps(self.to_dict())  # in a tenth of the time that json takes


def load_json(body: bytes | str) -> Any:
    """Returns the value that a JSON text stands for. Raises RequestError."""
    try:
        text = body.decode("utf-8") if isinstance(body, bytes) else body
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8: {error}") from None
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except RecursionError:
        raise RequestError("the body is nested too deeply; expected a flat object of request fields") from None
    except RequestError:
        raise
    except ValueError as error:  # also of a number with thousands of digits
        raise RequestError(f"the body is not JSON: {error}") from None


def _refuse_constant(name: str) -> Any:
    raise RequestError(f"the body is not JSON: {name} is not a number of JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in pairs:
        if name in tree:
            raise RequestError(f"{_shown(name)} is given twice; give each field once")
        tree[name] = value
    return tree


_REQUEST = ("query", "user", "pipeline", "arm", "filters", "facets", "size", "cursor", "explain")
_USER = ("id", "features", "clicked_items", "clicked_item_types", "past_queries")


class _Fields:
    """An object of a request, with typed readers of its fields."""

    def __init__(self, where: str, tree: Any, allowed: Iterable[str]) -> None:
        if not isinstance(tree, dict):
            raise RequestError(f"{where or 'the body'}: got {_shown(tree)}, expected an object")
        self.tree = tree
        self._where = f"{where}." if where else ""
        for name in tree:
            if name not in allowed:
                raise RequestError(f"unknown field {_shown(self._where + name)}, expected {', '.join(allowed)}")

    def read(self, name: str, default: T, check: Callable[[str, Any], T]) -> T:
        """Returns what `check` makes of a field; `default` if the field is left out or null."""
        value = self.tree.get(name)
        return default if value is None else check(self._where + name, value)


def _shown(value: Any) -> str:
    """Returns a value as an error shows it, which may repeat a request of megabytes only in part."""
    text = json.dumps(value) if not isinstance(value, (list, dict)) else f"a {_KINDS[type(value)]}"
    return text if len(text) <= 80 else f"{text[:77]}..."


_KINDS = {list: "list", dict: "object"}


def _text(where: str, value: Any, most: int = MAX_TEXT) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{where}: got {_shown(value)}, expected a text")
    if len(value) > most:
        raise RequestError(f"{where}: has {len(value)} characters, expected at most {most}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{where}: holds half of a surrogate pair, expected Unicode text") from None
    return value


def _cursor(where: str, value: Any) -> str:
    return _text(where, value, MAX_CURSOR)


def _name(where: str, value: Any) -> str:
    if not value:
        raise RequestError(f"{where}: got {_shown(value)}, expected the name of an attribute")
    return _text(where, value)


def _item(where: str, value: Any) -> int | str:
    if isinstance(value, int) and not isinstance(value, bool):
        if not -(2**63) <= value < 2**63:
            raise RequestError(f"{where}: got {_shown(value)}, expected an integer of 64 bits")
        return value
    if not isinstance(value, str):
        raise RequestError(f"{where}: got {_shown(value)}, expected an integer or a text")
    return _text(where, value)


def _flag(where: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"{where}: got {_shown(value)}, expected true or false")
    return value


def _size(where: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RequestError(f"{where}: got {_shown(value)}, expected an integer of at least 1")
    return value


def _list_of(check: Callable[[str, Any], T], most: int = MAX_VALUES) -> Callable[[str, Any], Sequence[T]]:
    def read(where: str, value: Any) -> Sequence[T]:
        if not isinstance(value, list):
            raise RequestError(f"{where}: got {_shown(value)}, expected a list")
        if len(value) > most:
            raise RequestError(f"{where}: has {len(value)} elements, expected at most {most}")
        return [check(f"{where}[{index}]", one) for index, one in enumerate(value)]

    return read


def _number(where: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise RequestError(f"{where}: got {_shown(value)}, expected a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RequestError(f"{where}: got {_shown(value)}, expected a finite number")
    return value  # an integer stays one, so that a category that is a number keeps its form


def _scalar(where: str, value: Any) -> str | float:
    return _text(where, value) if isinstance(value, str) else _number(where, value)


def _object(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(f"{where}: got {_shown(value)}, expected an object")
    if len(value) > MAX_NAMES:
        raise RequestError(f"{where}: has {len(value)} fields, expected at most {MAX_NAMES}")
    for name in value:
        _name(f"{where}: name", name)
    return value


def _features(where: str, value: Any) -> dict[str, Any]:
    def read(where: str, one: Any) -> Any:
        if isinstance(one, list):
            return _list_of(_scalar)(where, one)
        return None if one is None else _scalar(where, one)

    return {name: read(f"{where}.{name}", one) for name, one in _object(where, value).items()}


def read_filters(where: str, value: Any) -> dict[str, Filter]:
    """Reads filters in their form in JSON. Raises RequestError, which begins with `where`."""
    return {name: _filter(f"{where}.{name}", one) for name, one in _object(where, value).items()}


def _filter(where: str, value: Any) -> Filter:
    if isinstance(value, dict):
        ends = _Fields(where, value, ("min", "max"))
        low, high = ends.read("min", None, _optional_number), ends.read("max", None, _optional_number)
        if low is None and high is None:
            raise RequestError(f"{where}: got no min and no max, expected at least one of them")
        return (low, high)
    values = _list_of(_scalar)(where, value) if isinstance(value, list) else [_scalar(where, value)]
    if not values:
        raise RequestError(f"{where}: got an empty list; give at least one value, or leave the filter out")
    return list(values)


def _optional_number(where: str, value: Any) -> float | None:
    return _number(where, value)


def rounded(score: float) -> float | None:
    """Returns a score with the digits that a float32 has, or None where JSON has no number for it."""
    return float(f"{score:.7g}") if math.isfinite(score) else None
