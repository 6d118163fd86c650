"""What a search request says of users of a store: the inputs of the signature `search` (docs/serving.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpsr_common.errors import CommandError
from dpsr_tf.data.schema import EVENT_TYPES
from dpsr_tf.data.store import RowsById, Store, StoredFeature, unpack_strings

USER = "user_"
# The inputs of `search` that hold a user's history.
HISTORY = ("clicked_items", "clicked_item_keys", "clicked_item_types", "past_queries")
# No model reads more of a history.
_LONGEST_HISTORY = 1000


class User(NamedTuple):
    """Who asks, and when."""

    id: int  # of the store; -1 is anonymous
    time: int | None = None  # seconds since 1970: what the user does from then on is not known yet; None: all is known


class UserRequests:
    """Users of a store, as requests tell them to a servable: raw values, and what they did before a time."""

    def __init__(self, store: Store, names: Collection[str]):
        """What the inputs of these names say of users; other names, such as "query", are left out.

        Raises:
            CommandError: the store does not have such a feature, or keeps it as tokens only.
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
                    f"{store.path}: keeps the user feature '{feature.name}' as tokens only, so nobody can be asked for "
                    f"with it; measure the model itself, --system=model:DIR"
                )
            self._features[name] = feature
            if feature.kind in ("categorical", "multi"):
                self._values[name] = unpack_strings(self._users, f"values.{feature.name}")
        self._history = [name for name in HISTORY if name in names]
        # What an item is called in a request.
        self._items = store.items()["id"]
        self._item_keys = store.item_keys() if "clicked_item_keys" in names else None
        self._queries = list(store.queries()) if "past_queries" in names else []

    def of(self, user: User) -> dict[str, Any]:
        """Values by name: text, number (None: absent) or list. One whom the store does not know is anonymous."""
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
        code = int(self._users[f"feature.{feature.name}"][row])
        if feature.kind == "categorical":
            return self._values[name][code - 1] if code else ""
        if code == 0:
            return None
        # A number of the bucket: its lower end, which belongs to it; of the first one, a number that float32 tells from
        # its upper end.
        end = feature.boundaries[max(0, code - 2)]
        return end if code > 1 else end - max(1.0, abs(end))

    def _history_of(self, row: int, time: int | None) -> dict[str, Any]:
        begin, end = self._users["event.splits"][row : row + 2].tolist()
        if time is not None:
            end = begin + int(np.searchsorted(self._users["event.time"][begin:end], time, side="left"))
        last = max(begin, end - _LONGEST_HISTORY)
        rows = self._users["event.item"][last:end]
        asked = self._users["event.query"][begin:end]
        changes = asked[np.r_[True, asked[1:] != asked[:-1]]][-_LONGEST_HISTORY:] if end > begin else asked
        told = {
            "clicked_items": lambda: self._items[rows].tolist(),
            "clicked_item_keys": lambda: [(self._item_keys or [])[item] for item in rows.tolist()],
            "clicked_item_types": lambda: [EVENT_TYPES[code] for code in self._users["event.type"][last:end].tolist()],
            "past_queries": lambda: [self._queries[query] for query in changes.tolist()],
        }
        return {name: told[name]() for name in self._history}


def told_to_client(store: Store, names: Collection[str]) -> Callable[[User], dict[str, Any]] | None:
    """A user of a store as dpsr_serving.client takes one; None where inputs of these names tell nothing of users.

    Raises:
        CommandError: as UserRequests.
    """
    if not any(name.startswith(USER) or name in HISTORY for name in names):
        return None
    requests = UserRequests(store, names)

    def tell(user: User) -> dict[str, Any]:
        told = requests.of(user)
        features = {name.removeprefix(USER): told.pop(name) for name in list(told) if name.startswith(USER)}
        # The client tells keys from ids by itself.
        return {"features": features} | {name.replace("item_keys", "items"): value for name, value in told.items()}

    return tell


def input_arrays(requests: Sequence[Mapping[str, Any]], ranks: Mapping[str, tuple[np.dtype, int]]) -> dict[str, Any]:
    """One array for each input, of requests that hold values by input's name.

    Args:
        requests: n of them; what one leaves out is absent.
        ranks: type (object for text) and rank of each input: 1 [n], 2 [n, the longest list]; other inputs are left out.

    Returns:
        Arrays padded with "", NaN and -1.
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
    """object [n], for texts that numpy would cut at a NUL byte."""
    array = np.empty(len(values), object)
    array[:] = [value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value for value in values]
    return array
