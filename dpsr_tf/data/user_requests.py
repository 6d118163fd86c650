"""What a search request says about its user, for users of a store: inputs of the signature `search`.

docs/serving.md describes the signature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpsr_common.errors import CommandError
from dpsr_tf.data.schema import EVENT_TYPES, VALUE_KINDS
from dpsr_tf.data.store import RowsById, Store, StoredFeature, unpack_strings

# The names of inputs with profile features begin with this.
USER = "user_"
# The inputs of `search` that hold a user's history.
HISTORY = ("clicked_items", "clicked_item_keys", "clicked_item_types", "past_queries")
# The longest history that a model can read.
_LONGEST_HISTORY = 1000


class User(NamedTuple):
    """The user who asks, and the time."""

    # The user's id in the store; -1 is the anonymous user.
    id: int
    # Seconds since 1970. Events from this time on are not known yet. None: all events are known.
    time: int | None = None


class UserRequests:
    """Makes the inputs of requests about users of a store: raw feature values, and the history before a time."""

    def __init__(self, store: Store, names: Collection[str]):
        """Prepares the inputs with these names.

        Args:
            store: the store with the users.
            names: names of the signature's inputs. Those that do not concern the user, such as "query", are ignored.

        Raises:
            CommandError: the store does not have a feature that an input names, or holds its tokens only.
        """
        self._users, self._rows = store.users(), RowsById(store.users()["id"])
        self._features: dict[str, StoredFeature] = {}
        self._values: dict[str, list[str]] = {}
        known = {feature.name: feature for feature in store.features.users}
        for name in names:
            if not name.startswith(USER):
                continue
            feature = known.get(name.removeprefix(USER))
            if feature is None:
                raise CommandError(
                    f"{store.path}: has no user feature '{name.removeprefix(USER)}', which the servable reads; "
                    f"give the store that its model was trained on"
                )
            if feature.kind == "text":
                raise CommandError(
                    f"{store.path}: keeps the user feature '{feature.name}' as tokens only, but requests need its "
                    f"text; measure the model instead of the servable, with --system=model:DIR"
                )
            self._features[name] = feature
            if feature.kind in VALUE_KINDS:
                self._values[name] = unpack_strings(self._users, f"values.{feature.name}")
        # Numbers themselves, if the store holds them.
        self._numbers: Mapping[str, np.ndarray] = store.numbers() or {}
        self._history = [name for name in HISTORY if name in names]
        # The ids of items in requests.
        self._items = store.items()["id"]
        self._item_keys = store.item_keys() if "clicked_item_keys" in names else None
        self._queries = list(store.queries()) if "past_queries" in names else []

    def of(self, user: User) -> dict[str, Any]:
        """Returns the inputs of a request by name: text, number (None if it is absent) or list.

        A user that the store does not know is the anonymous user.
        """
        row = max(0, int(self._rows(np.array([user.id]))[0]))
        values = {name: self._value(name, feature, row) for name, feature in self._features.items()}
        if self._history:
            values |= self._history_of(row, user.time)
        return values

    def _value(self, name: str, feature: StoredFeature, row: int) -> Any:
        if feature.kind == "multi":
            splits = self._users[f"feature.{feature.name}.splits"]
            codes = self._users[f"feature.{feature.name}.values"][splits[row] : splits[row + 1]]
            return [self._values[name][code - 1] for code in codes.tolist()]
        if feature.kind == "vector":
            splits = self._users[f"feature.{feature.name}.splits"]
            return self._users[f"feature.{feature.name}.values"][splits[row] : splits[row + 1]].tolist()
        code = int(self._users[f"feature.{feature.name}"][row])
        if feature.kind == "categorical":
            return self._values[name][code - 1] if code else ""
        if f"user.{feature.name}" in self._numbers:
            number = float(self._numbers[f"user.{feature.name}"][row])
            return None if math.isnan(number) else number
        if code == 0:
            return None
        # The store holds the bucket only, so any number of the bucket will do. It is the lower bound, which belongs to
        # the bucket; in the first bucket, a number below the upper bound that float32 can tell from it.
        bound = feature.boundaries[max(0, code - 2)]
        return bound if code > 1 else bound - max(1.0, abs(bound))

    def _history_of(self, row: int, time: int | None) -> dict[str, Any]:
        begin, end = self._users["event.splits"][row : row + 2].tolist()
        if time is not None:
            end = begin + int(np.searchsorted(self._users["event.time"][begin:end], time, side="left"))
        last = max(begin, end - _LONGEST_HISTORY)
        rows = self._users["event.item"][last:end]
        asked = self._users["event.query"][begin:end]
        changes = asked[np.r_[True, asked[1:] != asked[:-1]]][-_LONGEST_HISTORY:] if end > begin else asked
        inputs = {
            "clicked_items": lambda: self._items[rows].tolist(),
            "clicked_item_keys": lambda: [(self._item_keys or [])[item] for item in rows.tolist()],
            "clicked_item_types": lambda: [EVENT_TYPES[code] for code in self._users["event.type"][last:end].tolist()],
            "past_queries": lambda: [self._queries[query] for query in changes.tolist()],
        }
        return {name: inputs[name]() for name in self._history}


def client_arguments(store: Store, names: Collection[str]) -> Callable[[User], dict[str, Any]] | None:
    """Makes the arguments with which dpsr_serving.client searches for a user of a store.

    Args:
        store: the store with the users.
        names: names of the signature's inputs.

    Returns:
        A function from a user to keyword arguments; None if no input concerns the user.

    Raises:
        CommandError: as in UserRequests.
    """
    if not any(name.startswith(USER) or name in HISTORY for name in names):
        return None
    requests = UserRequests(store, names)

    def arguments(user: User) -> dict[str, Any]:
        inputs = requests.of(user)
        features = {name.removeprefix(USER): inputs.pop(name) for name in list(inputs) if name.startswith(USER)}
        # The client has one argument for ids and text ids of items.
        return {"features": features} | {name.replace("item_keys", "items"): value for name, value in inputs.items()}

    return arguments


def input_arrays(requests: Sequence[Mapping[str, Any]], ranks: Mapping[str, tuple[np.dtype, int]]) -> dict[str, Any]:
    """Joins requests into one array per input.

    Args:
        requests: n requests, each with values by the name of the input. An input may be absent.
        ranks: the type (object for text) and the rank of each input. Rank 1 is [n], rank 2 is [n, longest list]. Inputs
            of other ranks are left out.

    Returns:
        Arrays by the name of the input, padded with "", NaN or -1.
    """
    arrays = {}
    for name, (dtype, rank) in ranks.items():
        padding: Any = "" if dtype.kind == "O" else math.nan if dtype.kind == "f" else -1
        if rank == 1:
            values = [padding if request.get(name) is None else request[name] for request in requests]
            arrays[name] = _texts(values) if dtype.kind == "O" else np.array(values, dtype)
        elif rank == 2:
            rows = [request.get(name) or [] for request in requests]
            width = max(map(len, rows), default=0)
            padded = [value for row in rows for value in [*row, *[padding] * (width - len(row))]]
            flat = _texts(padded) if dtype.kind == "O" else np.array(padded, dtype)
            arrays[name] = flat.reshape(len(rows), width)
    return arrays


def _texts(values: Sequence[str | bytes]) -> np.ndarray:
    """Returns texts as object [n], because NumPy's own text types drop NUL bytes at the end."""
    array = np.empty(len(values), object)
    array[:] = [value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value for value in values]
    return array
