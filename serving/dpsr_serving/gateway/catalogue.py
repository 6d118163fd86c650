"""The items as a search shows, filters, counts and groups them: the file catalogue.dpsr beside an inverted index.

`dpsr index --inverted` writes it (dpsr_export/inverted_index.py). It is a packed file of kind "catalogue" with one row
for each item, in ascending order of the ids:

    id                                int64 [items]
    key.splits, key.bytes             the shop's own id, if that is a text
    title.splits, title.bytes         the title
    value.NAME, splits.NAME, text.*   each attribute of the schema's filters, as in item_attributes.dpsr
                                      (dpsr_export/item_attributes.py)
    group                             int32 [items], the group of variants, -1 for none; if the schema has a group
    group_text.splits, .bytes         the text of each group
    identifier.hash, identifier.row   uint64 and int32 [identifiers], ascending: hashes of normalised identifiers, and
                                      the items that have them
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpsr_common.errors import CommandError
from dpsr_common.packed_file import FormatError, PackedFile
from dpsr_common.search_index import (
    CATALOGUE,
    FORMAT,
    FORMAT_VERSION,
    KEYWORD,
    MANIFEST,
    NUMBER,
    file_record,
    identifier_hash,
)
from dpsr_common.search_index import (
    TANTIVY as TANTIVY,
)

_KEPT_TEXTS = 2**14  # decoded texts of an attribute that are kept


@dataclasses.dataclass(frozen=True)
class Condition:
    """What a filter asks of one attribute. An item meets it if one of the values or ranges fits one of its values.

    Attributes:
        name: the attribute.
        texts: of a keyword: the alternatives.
        ranges: of a number: (low, high), both ends included; an open end is infinite.
    """

    name: str
    texts: tuple[str, ...] = ()
    ranges: tuple[tuple[float, float], ...] = ()


class Attribute:
    """A column of the catalogue.

    Attributes:
        name: as in filters and facets.
        kind: "keyword" (texts) or "number".
        multi: whether an item may have several values.
        numbers: of a number, float [items], NaN where an item has none; else None.
        codes: of a keyword, 0 where an item has none: int [items], or int [values] if it is multi-valued; else None.
        splits: int64 [items + 1], where the codes of each item begin, if it is multi-valued; else None.
        texts: of a keyword, the text of code i + 1, ascending by its UTF-8 bytes.
    """

    def __init__(self, name: str, file: PackedFile) -> None:
        self.name = name
        self.multi = f"splits.{name}" in file
        self.kind = KEYWORD if f"text.{name}.splits" in file else NUMBER
        values = file[f"value.{name}"]
        self.numbers = values if self.kind == NUMBER else None
        self.codes = values if self.kind == KEYWORD else None
        self.splits = file[f"splits.{name}"] if self.multi else None
        self.texts = _Texts(file, f"text.{name}") if self.kind == KEYWORD else None

    def code(self, text: str) -> int:
        """Returns the code of a text, or 0 if no item has it."""
        assert self.texts is not None
        low, high = 0, len(self.texts)
        wanted = text.encode("utf-8", "surrogatepass")
        while low < high:
            middle = (low + high) // 2
            if self.texts.encoded(middle) < wanted:
                low = middle + 1
            else:
                high = middle
        return low + 1 if low < len(self.texts) and self.texts.encoded(low) == wanted else 0

    def codes_of(self, rows: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Returns all codes of some items, and for each the place of its item in `rows`."""
        assert self.codes is not None
        if self.splits is None:
            return self.codes[rows], np.arange(len(rows))
        begins, ends = self.splits[rows], self.splits[rows + 1]
        lengths = ends - begins
        places = np.repeat(np.arange(len(rows)), lengths)
        offsets = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return self.codes[np.repeat(begins, lengths) + offsets], places

    def value(self, row: int) -> Any:
        """Returns the value of an item: a text, a list of texts, a float, or None."""
        if self.numbers is not None:
            number = float(self.numbers[row])
            return None if math.isnan(number) else number
        assert self.texts is not None
        codes, _ = self.codes_of(np.array([row]))
        found = [self.texts[code - 1] for code in codes.tolist() if code]
        return (found or None) if self.multi else (found[0] if found else None)

    def values(self, rows: NDArray[np.int64]) -> list[Any]:
        """Returns the values of several items, each as `value` does, in much less time than one after the other."""
        if self.numbers is not None:
            return [None if number != number else number for number in self.numbers[rows].tolist()]
        assert self.texts is not None
        codes, places = self.codes_of(rows)
        texts = [self.texts.text(code - 1) if code else None for code in codes.tolist()]
        if not self.multi:
            return texts
        found: list[Any] = [None] * len(rows)
        for place, text in zip(places.tolist(), texts, strict=True):
            if text is not None:
                found[place] = [*(found[place] or ()), text]
        return found

    def matches(self, rows: NDArray[np.int64], condition: Condition) -> NDArray[np.bool_]:
        """Tells which of the items meet a condition, bool [rows]."""
        found = np.zeros(len(rows), bool)
        if self.numbers is not None:
            given = self.numbers[rows].astype(np.float64)
            for low, high in condition.ranges:
                found |= (given >= low) & (given <= high)
            return found
        wanted = [code for code in map(self.code, condition.texts) if code]
        codes, places = self.codes_of(rows)
        found[places[np.isin(codes, wanted)]] = True
        return found

    def facet(self, rows: NDArray[np.int64], limit: int) -> dict[str, Any]:
        """Counts the values of some items; see Catalogue.facets."""
        if self.numbers is not None:
            given = self.numbers[rows]
            given = given[~np.isnan(given)]
            ends = (float(given.min()), float(given.max())) if len(given) else (None, None)
            return {"kind": NUMBER, "min": ends[0], "max": ends[1], "count": len(given)}
        assert self.texts is not None
        codes, places = self.codes_of(rows)
        codes = codes.astype(np.int64)
        if self.multi:
            # An item that has a value twice counts once.
            codes = np.unique(np.stack([places, codes]), axis=1)[1]
        values, counts = np.unique(codes[codes > 0], return_counts=True)
        # The most frequent first. Codes are in the order of the texts, so values of equal counts are, too.
        order = np.lexsort((values, -counts))[:limit]
        texts = self.texts.several(values[order] - 1)
        found = [{"value": text, "count": count} for text, count in zip(texts, counts[order].tolist(), strict=True)]
        return {"kind": KEYWORD, "values": found, "more": len(values) - len(order)}


class _Texts(Sequence[str]):
    """Texts in a packed file, decoded one at a time.

    Attributes:
        text: returns the text at a place, and keeps the last _KEPT_TEXTS of them.
    """

    def __init__(self, file: PackedFile, name: str) -> None:
        self._splits, self._bytes = file[f"{name}.splits"], file[f"{name}.bytes"]
        self._view = memoryview(self._bytes.data)  # slices of it cost a fraction of NumPy's
        # Of the texts that are asked for one by one, those of attributes, many come back with every page.
        self.text = functools.lru_cache(_KEPT_TEXTS)(self._decoded)

    def __len__(self) -> int:
        return len(self._splits) - 1

    def encoded(self, place: int) -> bytes:
        """Returns a text in UTF-8."""
        return self._bytes[self._splits[place] : self._splits[place + 1]].tobytes()

    def several(self, places: NDArray[Any]) -> list[str]:
        """Returns several texts; any text for a place of -1."""
        begins, ends, view = self._splits[places].tolist(), self._splits[places + 1].tolist(), self._view
        return [str(view[begin:end], "utf-8", "replace") for begin, end in zip(begins, ends, strict=True)]

    def __getitem__(self, place: Any) -> Any:
        return self._decoded(place)

    def _decoded(self, place: int) -> str:
        return self.encoded(place).decode("utf-8", "replace")

    def find(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Returns the first place of each of some texts, int64 [k]; -1 for a text that is not here."""
        found = np.full(len(texts), -1, np.int64)
        wanted = [text.encode("utf-8", "surrogatepass") for text in texts]
        lengths = np.diff(self._splits)
        for length in {len(text) for text in wanted} - {0}:
            rows = np.flatnonzero(lengths == length)
            here = self._bytes[self._splits[rows][:, None] + np.arange(length)]
            mine = [place for place, text in enumerate(wanted) if len(text) == length]
            if len(mine) > 32:  # by then a table costs less than comparisons
                row_of = dict(zip(reversed(here.view(f"V{length}").ravel().tolist()), rows[::-1].tolist(), strict=True))
                found[mine] = [row_of.get(wanted[place], -1) for place in mine]
                continue
            for place in mine:
                same = rows[(here == np.frombuffer(wanted[place], np.uint8)).all(axis=1)]
                found[place] = same[0] if len(same) else -1
        return found


class Catalogue:
    """The items of a store, memory-mapped. Thread-safe: it never changes.

    Attributes:
        manifest: the content of inverted.json.
        ids: int64 [items], ascending.
        num_items: number of items.
        attributes: name -> Attribute, in the order of the schema's filters.
    """

    def __init__(self, manifest: dict[str, Any], file: PackedFile) -> None:
        self.manifest = manifest
        self.ids: NDArray[np.int64] = file["id"]
        self.num_items = len(self.ids)
        self.attributes = {entry["name"]: Attribute(entry["name"], file) for entry in manifest["attributes"]}
        self._titles = _Texts(file, "title")
        self._keys = _Texts(file, "key") if "key.splits" in file else None
        self._groups = file.get("group")
        self._group_texts = _Texts(file, "group_text") if "group" in file else None
        self._hashes, self._identified = file["identifier.hash"], file["identifier.row"]

    @classmethod
    def open(cls, directory: Path, verify: bool = True) -> Catalogue:
        """Opens what `dpsr index --inverted` wrote.

        Args:
            directory: has inverted.json and the files that it lists.
            verify: whether to read all files and compare their checksums.

        Raises:
            CommandError: the directory or a file in it is missing, damaged, of another version, or of another index.
        """
        manifest = read_manifest(directory)
        try:
            for name, record in manifest["files"].items():
                _check_file(directory / name, record, verify)
            file = PackedFile(str(directory / CATALOGUE), "catalogue", verify=verify)
            catalogue = cls(manifest, file)
        except (FormatError, OSError) as error:
            raise CommandError(f"{error}; {_MAKE_AGAIN}") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise CommandError(f"{directory / MANIFEST}: is malformed ({error}); {_MAKE_AGAIN}") from None
        if catalogue.num_items != manifest["items"]:
            raise CommandError(
                f"{directory}: {CATALOGUE} has {catalogue.num_items:,} items, {MANIFEST} says {manifest['items']:,}; "
                f"{_MAKE_AGAIN}"
            )
        return catalogue

    @property
    def has_keys(self) -> bool:
        """Whether the shop's own ids are texts."""
        return self._keys is not None

    @property
    def has_groups(self) -> bool:
        """Whether the schema names groups of variants."""
        return self._groups is not None

    def rows(self, ids: Any) -> NDArray[np.int64]:
        """Returns the rows of item ids, int64 [k]; -1 where an id is unknown."""
        wanted = np.asarray(ids, np.int64)
        if not self.num_items:
            return np.full(wanted.shape, -1, np.int64)
        places = np.minimum(np.searchsorted(self.ids, wanted), self.num_items - 1)
        return np.where(self.ids[places] == wanted, places, -1)

    def title(self, row: int) -> str:
        """Returns the title of an item."""
        return str(self._titles[row])

    def key(self, row: int) -> str | None:
        """Returns the shop's own id of an item, or None where ids are numbers."""
        return None if self._keys is None else str(self._keys[row])

    def rows_of_keys(self, keys: Sequence[str]) -> NDArray[np.int64]:
        """Returns the rows of items by the shop's own ids, int64 [k]; -1 where a key is unknown.

        It looks at all keys, which takes some tenths of a second for a million items, so it is not for searches.
        """
        return np.full(len(keys), -1, np.int64) if self._keys is None else self._keys.find(keys)

    def attributes_of(self, row: int) -> dict[str, Any]:
        """Returns attribute -> a text, a list of texts, or a float; without those that the item lacks."""
        values = {name: attribute.value(row) for name, attribute in self.attributes.items()}
        return {name: value for name, value in values.items() if value is not None}

    def keys_of(self, rows: NDArray[np.int64]) -> list[str]:
        """Returns the shop's own ids of several items of a shop whose ids are texts."""
        assert self._keys is not None
        return self._keys.several(rows)

    def cards(self, rows: NDArray[np.int64]) -> list[tuple[str | None, str, dict[str, Any]]]:
        """Returns key, title and attributes of several items, as `key`, `title` and `attributes_of` do."""
        keys = [None] * len(rows) if self._keys is None else self._keys.several(rows)
        attributes: list[dict[str, Any]] = [{} for _ in keys]
        for name, attribute in self.attributes.items():
            for found, value in zip(attributes, attribute.values(rows), strict=True):
                if value is not None:
                    found[name] = value
        return list(zip(keys, self._titles.several(rows), attributes, strict=True))

    def conditions(self, filters: Mapping[str, Any] | None) -> tuple[Condition, ...]:
        """Reads the filters of a request. An item passes if it meets all conditions.

        The meaning is that of the servable's filters: an item without a value meets no condition on that attribute,
        and a value that no item has is not an error.

        Args:
            filters: attribute -> one value, a list of alternatives, or a range: (low, high) that includes both ends,
                with None for an open end.

        Raises:
            ValueError: there is no such attribute, or a value does not fit its kind.
        """
        return tuple(self._condition(name, given) for name, given in (filters or {}).items())

    def _condition(self, name: str, given: Any) -> Condition:
        attribute = self.attributes.get(name)
        if attribute is None:
            known = ", ".join(self.attributes) or "none (name some in the schema under items.filters)"
            raise ValueError(f"filter {name!r}: there is no such attribute; expected one of {known}")
        values: list[Any] = list(given) if isinstance(given, (list, Set)) else [given]
        if not values:
            raise ValueError(f"filter {name!r}: has no values; give at least one, or leave the filter out")
        if attribute.kind == KEYWORD:
            return Condition(name, texts=tuple(_keyword(name, value) for value in values))
        return Condition(name, ranges=tuple(_range(name, value) for value in values))

    def matches(self, rows: NDArray[np.int64], filters: Any) -> NDArray[np.bool_]:
        """Tells which items pass filters: bool [k] for rows int64 [k].

        `filters` are those of a request, or what `conditions` made of them. Raises ValueError as `conditions` does.
        """
        conditions = filters if isinstance(filters, tuple) else self.conditions(filters)
        found = np.ones(len(rows), bool)
        for condition in conditions:
            found &= self.attributes[condition.name].matches(rows, condition)
        return found

    def facets(self, rows: NDArray[np.int64], names: Iterable[str], limit: int) -> dict[str, dict[str, Any]]:
        """Counts the values of attributes over some items.

        Returns:
            Attribute -> of a keyword {"kind", "values": [{"value", "count"}], "more"}, the most frequent `limit`
            values, and how many more there are; of a number {"kind", "min", "max", "count"}, None without numbers.

        Raises:
            ValueError: there is no such attribute.
        """
        return {name: self._attribute(name).facet(rows, limit) for name in names}

    def _attribute(self, name: str) -> Attribute:
        if name not in self.attributes:
            known = ", ".join(self.attributes) or "none (name some in the schema under items.filters)"
            raise ValueError(f"facet {name!r}: there is no such attribute; expected one of {known}")
        return self.attributes[name]

    def group(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the group of variants of each item, int64 [k]; -1 - row for an item that is in none."""
        rows = np.asarray(rows, np.int64)
        if self._groups is None:
            return -1 - rows
        groups = self._groups[rows].astype(np.int64)
        return np.where(groups >= 0, groups, -1 - rows)

    def group_text(self, group: int) -> str | None:
        """Returns the text of a group; None for -1 - row."""
        return None if group < 0 or self._group_texts is None else str(self._group_texts[group])

    def identifier(self, text: str) -> NDArray[np.int64]:
        """Returns the ids of the items of which `text` is the identifier, or the shop's own id; [] if there is none.

        Case, spaces and punctuation do not matter. A text without a digit, or with fewer than SHORTEST_IDENTIFIER
        letters and digits, is not an identifier.
        """
        hashed = identifier_hash(text)
        if hashed is None:
            return np.zeros(0, np.int64)
        begin, end = (int(np.searchsorted(self._hashes, np.uint64(hashed), side)) for side in ("left", "right"))
        return self.ids[self._identified[begin:end]]


_MAKE_AGAIN = "run `dpsr index --inverted` again"


def read_manifest(directory: Path) -> dict[str, Any]:
    """Reads inverted.json. Raises CommandError if it is missing, damaged or of another version."""
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CommandError(
            f"{directory}: holds no inverted index (no {MANIFEST}); make one with `dpsr index --inverted`"
        ) from None
    except (OSError, ValueError) as error:
        raise CommandError(f"{path}: cannot be read: {error}; {_MAKE_AGAIN}") from None
    got = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else (None, None)
    if got != (FORMAT, FORMAT_VERSION):
        raise CommandError(
            f"{path}: is of {got[0]} version {got[1]}, expected {FORMAT} version {FORMAT_VERSION}; {_MAKE_AGAIN}"
        )
    return dict(manifest)


def check_same_store(catalogue: Catalogue, servable: Path) -> None:
    """Raises CommandError if a servable, a version directory, was made from another store than the inverted index."""
    path = servable / "assets.extra" / "dpsr_manifest.json"
    try:
        manifest = json.loads(path.read_text("utf-8"))
        kind = manifest.get("kind", "retrieval")
        found = (manifest.get("index") or manifest)["vocabulary_fingerprint"] if kind == "retrieval" else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CommandError(f"{path}: cannot be read: {error}; give a version directory of a servable") from None
    if found is None:
        raise CommandError(
            f"{servable}: is a {kind} servable, which has no vocabulary to compare with the index; leave `servable` "
            f"out for this model"
        )
    expected = catalogue.manifest["store"]["vocabulary_fingerprint"]
    if found != expected:
        raise CommandError(
            f"{servable}: its vocabulary is {found}, that of the inverted index is {expected}; make both from one store"
        )


def _check_file(path: Path, record: Mapping[str, Any], verify: bool) -> None:
    """Raises CommandError if a file is not the one that the manifest lists."""
    if not path.is_file():
        raise CommandError(f"{path}: is missing; {_MAKE_AGAIN}")
    size = path.stat().st_size
    if size != record["bytes"]:
        raise CommandError(f"{path}: has {size:,} bytes, expected {record['bytes']:,}; {_MAKE_AGAIN}")
    if verify and file_record(path)["xxh3"] != record["xxh3"]:
        raise CommandError(f"{path}: is damaged: its checksum differs; {_MAKE_AGAIN}")


def _keyword(name: str, value: Any) -> str:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"filter {name!r}: got {value!r}; the attribute is a keyword, expected a text")
    if isinstance(value, int):
        return str(value)
    return str(int(float(value))) if float(value).is_integer() else repr(float(value))


def _range(name: str, value: Any) -> tuple[float, float]:
    ends = value if isinstance(value, tuple) else (value, value)
    if len(ends) != 2 or ends == (None, None) or not all(end is None or _is_number(end) for end in ends):
        raise ValueError(
            f"filter {name!r}: got {value!r}; the attribute is a number, expected a finite number or a range of them"
        )
    low, high = ends
    return (-math.inf if low is None else float(low), math.inf if high is None else float(high))


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
