"""Requests to a search servable and its results as typed values, for any transport."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from dpsr_common import serving_apis
from dpsr_serving.tensors import make_tensor, to_numpy

if TYPE_CHECKING:
    from typing import Unpack  # Python 3.10 does not have it

Text = str | bytes
Feature = str | bytes | float | Sequence[Text] | Sequence[float] | None
Bound = float | None
Filter = Text | float | tuple[Bound, Bound] | list[Any] | Set[Text] | Set[float]
Filters = Mapping[str, Filter] | Sequence[str]

PADDING_ID = -1
_STRING, _FLOAT, _INT64 = 7, 1, 9  # DT_... of tensorflow/core/framework/types.proto
_NAMES = {1: "float", 2: "double", 3: "int32", 7: "string", 9: "int64", 10: "bool"}
_USER = "user_"
# The user's id, an input of `rank`.
_USER_ID = "user_id"

# The inputs of `search` beside `query`, `k` and the user's features: name -> (type, rank).
_INPUTS = {
    "search_parameters": (_STRING, 0),
    "include": (_STRING, 2),
    "exclude": (_STRING, 2),
    "excluded_item_ids": (_INT64, 2),
    "excluded_item_keys": (_STRING, 2),
    "clicked_items": (_INT64, 2),
    "clicked_item_keys": (_STRING, 2),
    "clicked_item_types": (_STRING, 2),
    "past_queries": (_STRING, 2),
}


@dataclasses.dataclass(frozen=True)
class User:
    """The user who searches. The model treats whatever is left out as unknown, as for an anonymous user.

    Attributes:
        features: name -> value of the schema's user features: str for a text or category, float for a number (None and
            NaN mean unknown), a sequence of str for a multi-valued feature, a sequence of float for a vector.
        clicked_items: items that the user clicked, oldest first: item ids, or keys if the shop's own ids are texts.
        past_queries: queries that the user made, oldest first.
        clicked_item_types: what the user did with each of `clicked_items`: click, cart or order. Items without a type
            count as clicks.
    """

    features: Mapping[str, Feature] = dataclasses.field(default_factory=dict)
    clicked_items: Sequence[int | str] = ()
    past_queries: Sequence[Text] = ()
    clicked_item_types: Sequence[Text] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class SearchResult:
    """The items found for one query, best first; n is at most the k asked for.

    Attributes:
        item_ids: [n] int64.
        scores: [n] float32, the largest inner product of item and query over the heads of the query tower.
        heads: [n] int32, the head that gave this score.
        item_keys: the shop's own ids if those are texts, else None.
        version: the model version that answered; 0 if the server does not say.
        arm: "experiment/arm" to which a proxy sent the request, or "".
        shards: (number of index shards that answered, number of all shards) behind a proxy with shards, else None.
    """

    item_ids: NDArray[np.int64]
    scores: NDArray[np.float32]
    heads: NDArray[np.int32]
    item_keys: tuple[str, ...] | None = None
    version: int = 0
    arm: str = ""
    shards: tuple[int, int] | None = None

    def __len__(self) -> int:
        """Returns the number of items found."""
        return len(self.item_ids)


@dataclasses.dataclass(frozen=True)
class Search:
    """One request: queries, a user for each query, and settings that hold for all queries."""

    queries: Sequence[Text]
    k: int | None
    users: Sequence[User | None]
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    exclude_items: Sequence[int | str] = ()
    search_parameters: str = ""

    @property
    def plain(self) -> bool:
        """Whether the signature `serving_default` can answer the request."""
        asked = self.include or self.exclude or self.exclude_items or self.search_parameters
        return self.k is None and not asked and not any(self.users)


@dataclasses.dataclass(frozen=True)
class Ranking:
    """One request to a ranker."""

    query: Text
    items: Sequence[int | str]
    user: User
    user_id: int | None
    dpsr_scores: Sequence[float]


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """Another way to say a query.

    Attributes:
        text: the rewrite; never empty.
        log_probability: the model's natural logarithm of the rewrite's probability, at most 0; the higher, the better.
            0 for a rewrite that the shop's list prescribes.
    """

    text: str
    log_probability: float


Users = User | Mapping[str, Any] | Sequence[User | Mapping[str, Any] | None] | None


class SearchOptions(TypedDict, total=False):
    """What SearchClient.search takes beside the queries; its docstring explains each option."""

    user: Users
    filters: Filters
    exclude_filters: Filters
    exclude_items: Sequence[int | str]
    search_parameters: str


def make_search(queries: Text | Sequence[Text], k: int | None, **options: Unpack[SearchOptions]) -> Search:
    """Makes a request, and checks what can be checked without knowing the model. Raises ValueError or TypeError."""
    if unknown := sorted(options.keys() - SearchOptions.__annotations__):
        expected = ", ".join(SearchOptions.__annotations__)
        raise TypeError(f"unknown option {', '.join(map(repr, unknown))}, expected metadata, {expected}")
    user = options.get("user")
    batch = [queries] if isinstance(queries, (str, bytes)) else list(queries)
    if k is not None and not 0 < k < 2**31:
        raise ValueError(f"k must be a positive int32, got {k}")
    if user is None or isinstance(user, (User, Mapping)):
        users = [_user(user)] * len(batch)
    else:
        users = [_user(one) for one in user]
        if len(users) != len(batch):
            raise ValueError(f"{len(users)} users for {len(batch)} queries; give one user, or one for each query")
    include, exclude = expressions(options.get("filters", ())), expressions(options.get("exclude_filters", ()))
    excluded = list(options.get("exclude_items", ()))
    return Search(batch, k, users, include, exclude, excluded, options.get("search_parameters", ""))


class RankOptions(TypedDict, total=False):
    """What SearchClient.rank takes beside the query and the items; its docstring explains each option."""

    user: User | Mapping[str, Any] | None
    user_id: int | None
    dpsr_scores: Sequence[float]


def make_ranking(query: Text, items: Sequence[int | str], **options: Unpack[RankOptions]) -> Ranking:
    """Makes a request, and checks what can be checked without knowing the model. Raises ValueError or TypeError."""
    if unknown := sorted(options.keys() - RankOptions.__annotations__):
        expected = ", ".join(RankOptions.__annotations__)
        raise TypeError(f"unknown option {', '.join(map(repr, unknown))}, expected metadata, {expected}")
    if not isinstance(query, (str, bytes)):
        raise ValueError(f"query must be one text, got {query!r}")
    if isinstance(items, (str, bytes)):
        raise ValueError(f"items must be a list of items, got {items!r}")
    scores = list(options.get("dpsr_scores", ()))
    if scores and len(scores) != len(items):
        raise ValueError(f"{len(scores)} dpsr_scores for {len(items)} items; give one for each item, or none")
    return Ranking(query, list(items), _user(options.get("user")) or User(), options.get("user_id"), scores)


def rewrite_tensors(queries: Text | Sequence[Text], n: int, seed: int) -> dict[str, NDArray[Any]]:
    """Returns the input tensors of a request to rewrite. Raises ValueError for what is not a text or not an integer."""
    batch = [queries] if isinstance(queries, (str, bytes)) else list(queries)
    if wrong := [query for query in batch if not isinstance(query, (str, bytes))]:
        raise ValueError(f"queries must be texts, got {wrong[0]!r}")
    for name, value, least, most in (("n", n, 1, 2**31), ("seed", seed, -(2**63), 2**63)):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not least <= value < most:
            expected = "a positive int32" if name == "n" else "an int64"
            raise ValueError(f"{name} must be {expected}, got {value!r}")
    return {"query": _texts(batch), "n": np.array(n, np.int32), "seed": np.array(seed, np.int64)}


def _user(user: User | Mapping[str, Any] | None) -> User | None:
    if user is None or isinstance(user, User):
        return user
    known = [field.name for field in dataclasses.fields(User)]
    if unknown := sorted(set(user) - set(known)):
        raise ValueError(f"unknown user attribute {', '.join(map(repr, unknown))}, expected {', '.join(known)}")
    return User(**user)


def expressions(filters: Filters) -> list[str]:
    """Returns filter expressions for the inputs `include` and `exclude`, one for each attribute.

        >>> expressions({"brand": ["Acme", "A|B"], "price": (10, 20), "rating": (4, None)})
        ['brand=Acme|A\\\\|B', 'price=10..20', 'rating=4..']

    Args:
        filters: attribute -> one value, a collection of alternatives, or a range of numbers: a tuple (low, high) that
            includes both ends, with None for an open end. A sequence of expressions is returned as it is.

    Raises:
        ValueError: no expression can be written for a name or value.
    """
    if not isinstance(filters, Mapping):
        if isinstance(filters, (str, bytes)):
            raise ValueError(f"filters must be a dict or a list of expressions, got {filters!r}")
        return list(filters)
    return [_expression(name, value) for name, value in filters.items()]


def _expression(name: str, value: Filter) -> str:
    if not name or "=" in name:
        raise ValueError(f"the name of an attribute must not be empty or contain '=', got {name!r}")
    if isinstance(value, tuple):
        if len(value) != 2 or value == (None, None) or any(isinstance(end, (str, bytes)) for end in value):
            raise ValueError(
                f"filter {name!r}: got {value!r}; a tuple means a range of numbers (low, high), one of which may be "
                "None; give alternatives as a list"
            )
        low, high = ("" if end is None else _literal(name, end) for end in value)
        return f"{name}={low}..{high}"
    alternatives = [value] if not isinstance(value, (list, Set)) else list(value)
    if not alternatives:
        raise ValueError(f"filter {name!r} has no values; give at least one, or leave the filter out")
    return f"{name}={'|'.join(_literal(name, one) for one in alternatives)}"


def _literal(name: str, value: Text | float) -> str:
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, str):
        return value.replace("\\", "\\\\").replace("|", "\\|")
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"filter {name!r}: got {value!r}, expected a text or a finite number")
    return str(int(value)) if float(value).is_integer() else repr(float(value))


class Signature:
    """The inputs of a servable's signature `search` or `rank`, and the number of results of `serving_default`.

    Attributes:
        version: the model version that has these inputs.
        default_k: number of results of `serving_default`; None if the model does not say.
        inputs: the names of all inputs, ascending.
        user_features: the user features that the model reads, ascending.
    """

    def __init__(self, inputs: Mapping[str, tuple[int, int]], version: int = 0, default_k: int | None = None) -> None:
        self.version = version
        self.default_k = default_k
        self._inputs = dict(inputs)
        self.inputs = sorted(inputs)
        # The user's id in `rank` is no feature. Features are texts and floats.
        self.user_features = [
            name.removeprefix(_USER) for name in self.inputs if name.startswith(_USER) and inputs[name][0] != _INT64
        ]

    @classmethod
    def parse(cls, response: Any, name: str = "search") -> Signature:
        """Reads a signature from a GetModelMetadataResponse. Raises ValueError if the model does not have it."""
        signatures = serving_apis.SignatureDefMap()
        signatures.ParseFromString(response.metadata["signature_def"].value)
        if name not in signatures.signature_def:
            raise ValueError(f"the model has no signature '{name}', only {sorted(signatures.signature_def)}")
        inputs = {
            key: (info.dtype, len(info.tensor_shape.dim)) for key, info in signatures.signature_def[name].inputs.items()
        }
        dims = signatures.signature_def["serving_default"].outputs["item_ids"].tensor_shape.dim
        default_k = dims[1].size if len(dims) == 2 and dims[1].size > 0 else None
        return cls(inputs, response.model_spec.version.value, default_k)

    def __eq__(self, other: object) -> bool:
        """Whether both have the same inputs."""
        return isinstance(other, Signature) and self._inputs == other._inputs

    __hash__ = None  # type: ignore[assignment]

    def only(self, names: Set[str]) -> Signature:
        """Returns a signature with those inputs alone, for requests that are completed with the other ones later."""
        return Signature(
            {name: kind for name, kind in self._inputs.items() if name in names}, self.version, self.default_k
        )

    @property
    def feature_kinds(self) -> dict[str, str]:
        """The user features that the model reads, each with its kind: "text", "number", "multi" or "vector"."""
        kinds = {(_STRING, 1): "text", (_FLOAT, 1): "number", (_STRING, 2): "multi", (_FLOAT, 2): "vector"}
        return {name: kinds.get(self._inputs[_USER + name], "") for name in self.user_features}

    def tensors(self, search: Search) -> dict[str, NDArray[Any]]:
        """Returns the input tensors of a request; whatever the request leaves out is empty.

        Raises:
            ValueError: the request has something that the model does not take, or of another type.
        """
        batch = len(search.queries)
        users = [user or User() for user in search.users]
        arrays = {"query": _texts(search.queries)}
        for name in sorted({name for user in users for name in user.features}):
            self._check_feature(name)
        clicks, clicked = self._items("clicked_items", "clicked_item_keys", [user.clicked_items for user in users])
        excluded = [search.exclude_items] * batch
        leaves_out, left_out = self._items("excluded_item_ids", "excluded_item_keys", excluded)
        given: dict[str, Any] = {
            "search_parameters": search.search_parameters,
            "include": [search.include] * batch,
            "exclude": [search.exclude] * batch,
            "past_queries": [user.past_queries for user in users],
            "clicked_item_types": _types_of(users),
            clicks: clicked,
            leaves_out: left_out,
        }
        for name, value in given.items():
            there = bool(value) if isinstance(value, str) else any(map(len, value))
            if there and name not in self._inputs:
                raise ValueError(f"this model takes no {name}; its inputs are {', '.join(sorted(self._inputs))}")
        for name, (dtype, rank) in self._inputs.items():
            if name == "k":
                if search.k is None and self.default_k is None:
                    raise ValueError(
                        "k is missing: the model has no default number of results for requests with a user, filters "
                        "or parameters"
                    )
                arrays[name] = np.array(search.k or self.default_k, np.int32)
            elif name == "search_parameters":
                arrays[name] = np.array(search.search_parameters.encode(), object)
            elif name.startswith(_USER):
                feature = name.removeprefix(_USER)
                arrays[name] = _feature(feature, dtype, rank, [user.features.get(feature) for user in users])
            elif _INPUTS.get(name) == (dtype, rank):
                arrays[name] = _rows(name, given.get(name, [()] * batch), dtype)
            elif name != "query":
                raise ValueError(
                    f"this client does not know the model's input {name!r}, {_NAMES.get(dtype, dtype)} of rank {rank}; "
                    "use the client of the release that exported the model"
                )
        return arrays

    def rank_tensors(self, ranking: Ranking) -> dict[str, NDArray[Any]]:
        """Returns the input tensors of a request to rank; whatever the request leaves out is empty.

        Raises:
            ValueError: the request has something that the model does not take, or of another type.
        """
        user = ranking.user
        for name in sorted(user.features):
            self._check_feature(name)
        if user.past_queries:
            raise ValueError(f"a ranker takes no past_queries; its inputs are {', '.join(self.inputs)}")
        to_rank, (items,) = self._items("item_ids", "item_keys", [ranking.items])
        clicks, clicked = self._items("clicked_items", "clicked_item_keys", [user.clicked_items])
        given = {clicks: clicked, "clicked_item_types": _types_of([user])}
        scores = np.array(ranking.dpsr_scores, np.float32)
        for name, there in ((clicks, user.clicked_items), ("dpsr_score", ranking.dpsr_scores)):
            if there and name not in self._inputs:
                raise ValueError(f"this model takes no {name}; its inputs are {', '.join(self.inputs)}")
        arrays: dict[str, NDArray[Any]] = {}
        for name, (dtype, rank) in self._inputs.items():
            if name == "query":
                arrays[name] = _texts([ranking.query])
            elif name == to_rank:
                arrays[name] = np.array(items, np.int64) if dtype == _INT64 else _texts(items)
            elif name == "dpsr_score":
                arrays[name] = scores
            elif name == _USER_ID:
                arrays[name] = np.array([] if ranking.user_id is None else _int64s([ranking.user_id]), np.int64)
            elif name.startswith(_USER):
                feature = name.removeprefix(_USER)
                arrays[name] = _feature(feature, dtype, rank, [user.features.get(feature)])
            elif _INPUTS.get(name) == (dtype, rank):
                arrays[name] = _rows(name, given.get(name, [()]), dtype)
            else:
                raise ValueError(
                    f"this client does not know the model's input {name!r}, {_NAMES.get(dtype, dtype)} of rank {rank}; "
                    "use the client of the release that exported the model"
                )
        return arrays

    def _check_feature(self, name: str) -> None:
        if name not in self.user_features:
            known = ", ".join(self.user_features) or "none"
            raise ValueError(f"the model reads no user feature {name!r}; those it reads: {known}")

    def _items(self, ids: str, keys: str, rows: Sequence[Sequence[Any]]) -> tuple[str, Sequence[Sequence[Any]]]:
        """Returns the name of the input for items, which is by id or by key, and the items in that form."""
        if keys in self._inputs:
            if wrong := [item for row in rows for item in row if not isinstance(item, (str, bytes))]:
                raise ValueError(f"this model identifies items by key, a text; got {wrong[0]!r}")
            return keys, rows
        try:
            return ids, [_int64s(row) for row in rows]
        except ValueError as error:
            raise ValueError(f"this model identifies items by id, an integer; {error}") from None


def _int64s(items: Iterable[Any]) -> list[int]:
    numbers: list[int] = []
    for item in items:
        try:
            numbers.append(int(item))
        except ValueError:
            raise ValueError(f"got {item!r}") from None
    if numbers and not -(2**63) <= min(numbers) <= max(numbers) < 2**63:
        wrong = next(number for number in numbers if not -(2**63) <= number < 2**63)
        raise ValueError(f"got {wrong}, which does not fit into 64 bits")
    return numbers


def _texts(texts: Sequence[Text]) -> NDArray[Any]:
    array = np.empty(len(texts), object)
    array[:] = [text.encode() if isinstance(text, str) else text for text in texts]
    return array


def _types_of(users: Sequence[User]) -> Sequence[Sequence[Text]]:
    """Returns the types of each user's clicks, "" for missing ones; no types at all if no user has any."""
    for user in users:
        if len(user.clicked_item_types) > len(user.clicked_items):
            raise ValueError(
                f"{len(user.clicked_item_types)} clicked_item_types for {len(user.clicked_items)} clicked_items"
            )
    if not any(user.clicked_item_types for user in users):
        return [()] * len(users)
    return [
        [*user.clicked_item_types, *[""] * (len(user.clicked_items) - len(user.clicked_item_types))] for user in users
    ]


def _rows(name: str, rows: Sequence[Sequence[Any]], dtype: int) -> NDArray[Any]:
    """Returns rows of different lengths as an array [batch, n], padded with -1 or empty texts."""
    width = max(map(len, rows), default=0)
    if dtype == _INT64:
        ids = np.full((len(rows), width), PADDING_ID, np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
        return ids
    array = np.full((len(rows), width), b"", object)
    for index, row in enumerate(rows):
        if isinstance(row, (str, bytes)) or not all(isinstance(text, (str, bytes)) for text in row):
            raise ValueError(f"{name}: expected a sequence of texts, got {row!r}")
        array[index, : len(row)] = _texts(row)
    return array


def _feature(name: str, dtype: int, rank: int, values: Sequence[Feature]) -> NDArray[Any]:
    """Returns a user feature of all users as an array.

    [batch] float, NaN if unknown; [batch] string, "" if unknown; [batch, n] string for a multi-valued feature; or
    [batch, n] float for a vector, NaN if unknown.
    """
    if dtype == _FLOAT and rank == 1:
        if wrong := [value for value in values if value is not None and not isinstance(value, numbers.Real)]:
            raise ValueError(f"user feature {name!r}: expected a number, got {wrong[0]!r}")
        return np.array([math.nan if value is None else float(value) for value in values], np.float32)  # type: ignore[arg-type]
    if dtype == _STRING and rank == 1:
        if wrong := [value for value in values if not isinstance(value, (str, bytes, int, type(None)))]:
            raise ValueError(f"user feature {name!r}: expected one text, got {wrong[0]!r}")
        return _texts(["" if value is None else str(value) if isinstance(value, int) else value for value in values])  # type: ignore[misc]
    if dtype == _STRING and rank == 2:
        if wrong := [value for value in values if not isinstance(value, (list, tuple, set, frozenset, type(None)))]:
            raise ValueError(f"user feature {name!r}: expected a list of texts, got {wrong[0]!r}")
        return _rows(f"user feature {name!r}", [list(value or ()) for value in values], dtype)  # type: ignore[arg-type]
    if dtype == _FLOAT and rank == 2:
        return _vectors(name, values)
    raise ValueError(
        f"user feature {name!r} is {_NAMES.get(dtype, dtype)} of rank {rank}, which this client cannot fill"
    )


def _vectors(name: str, values: Sequence[Feature]) -> NDArray[np.float32]:
    """Returns vectors of one length as an array [batch, length], with rows of NaN for unknown ones."""
    try:
        rows = [np.asarray(() if value is None else value, np.float32) for value in values]
    except (TypeError, ValueError):
        rows = []
    lengths = {len(row) for row in rows if row.ndim == 1} - {0}
    if len(rows) < len(values) or any(row.ndim != 1 for row in rows) or len(lengths) > 1:
        raise ValueError(f"user feature {name!r}: expected a list of numbers, of the same length for all users")
    array = np.full((len(rows), max(lengths, default=0)), math.nan, np.float32)
    for index, row in enumerate(rows):
        array[index, : len(row)] = row if len(row) else math.nan
    return array


def make_request(spec: Any, signature: str, arrays: Mapping[str, NDArray[Any]]) -> Any:
    """Returns a PredictRequest for a signature with these inputs."""
    request = serving_apis.PredictRequest()
    request.model_spec.CopyFrom(spec)
    request.model_spec.signature_name = signature
    for name, array in arrays.items():
        request.inputs[name].CopyFrom(make_tensor(array))
    return request


def results(response: Any, batch: int, trailing: Iterable[tuple[str, Text]]) -> list[SearchResult]:
    """Returns the results of `batch` queries. Raises ValueError if the response is not that of a search servable."""
    outputs = _decode(response.outputs, batch)
    ids, scores, heads = outputs["item_ids"], outputs["scores"], outputs["heads"]
    keys = outputs.get("item_keys")
    metadata = dict(trailing)
    arm, shards = str(metadata.get("dpsr-arm", "")), None
    if "dpsr-shards" in metadata:
        answered, _, total = str(metadata["dpsr-shards"]).partition("/")
        shards = (int(answered), int(total))
    version = response.model_spec.version.value
    found_results = []
    for row in range(batch):
        found = ids[row] != PADDING_ID
        row_keys = None
        if keys is not None:
            row_keys = tuple(key.decode("utf-8", "replace") for key in keys[row][found])
        found_results.append(
            SearchResult(ids[row][found], scores[row][found], heads[row][found], row_keys, version, arm, shards)
        )
    return found_results


def scores_of(response: Any, items: int) -> NDArray[np.float32]:
    """Returns the score of each item. Raises ValueError if the response is not that of a ranker."""
    if "scores" not in response.outputs:
        raise ValueError(f"the output 'scores' is missing; there are {sorted(response.outputs)}")
    scores = to_numpy(response.outputs["scores"])
    if scores.dtype != np.float32 or scores.shape != (items,):
        raise ValueError(f"output 'scores' is {scores.dtype.name} {list(scores.shape)}, expected float32 [{items}]")
    return scores


def rewrites_of(response: Any, batch: int) -> list[list[Rewrite]]:
    """Returns the rewrites of each query, best first. Raises ValueError if the response is not that of a rewriter."""
    arrays = []
    for name, kind in (("rewrites", "O"), ("log_probabilities", "f4")):
        if name not in response.outputs:
            raise ValueError(f"the output {name!r} is missing; there are {sorted(response.outputs)}")
        array = to_numpy(response.outputs[name])
        if array.dtype != np.dtype(kind) or array.ndim != 2 or array.shape[0] != batch:
            raise ValueError(
                f"output {name!r} is {array.dtype.name} {list(array.shape)}, "
                f"expected {'string' if kind == 'O' else 'float32'} [{batch}, n]"
            )
        arrays.append(array)
    texts, scores = arrays
    if texts.shape != scores.shape:
        raise ValueError(f"rewrites have the shape {list(texts.shape)}, but log_probabilities {list(scores.shape)}")
    return [
        [
            Rewrite(text.decode("utf-8", "replace"), float(score))
            for text, score in zip(*row, strict=True)
            if text  # the rows are padded with empty texts
        ]
        for row in zip(texts, scores, strict=True)
    ]


def _decode(outputs: Any, batch: int) -> dict[str, NDArray[Any]]:
    """Decodes and checks the outputs of a search signature. Raises ValueError."""
    decoded: dict[str, NDArray[Any]] = {}
    shape: tuple[int, ...] | None = None
    for name, kind in (("item_ids", "i8"), ("scores", "f4"), ("heads", "i4"), ("item_keys", "O")):
        if name not in outputs:
            if name == "item_keys":
                continue
            raise ValueError(f"the output {name!r} is missing; there are {sorted(outputs)}")
        array = to_numpy(outputs[name])
        if array.dtype != np.dtype(kind) or array.ndim != 2 or array.shape[0] != batch:
            raise ValueError(
                f"output {name!r} is {array.dtype.name} {list(array.shape)}, "
                f"expected {np.dtype(kind).name} [{batch}, k]"
            )
        if shape is not None and array.shape != shape:
            raise ValueError(f"output {name!r} has the shape {list(array.shape)}, but item_ids have {list(shape)}")
        shape = array.shape
        decoded[name] = array
    return decoded
