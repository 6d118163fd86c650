"""Judgments: the relevant items of queries, from tables of human judgments or from what a store held out."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import flags

from dpsr_common.errors import CommandError, UsageError
from dpsr_tf.data.store import Store
from dpsr_tf.data.tables import Table, check_kind
from dpsr_tf.data.user_requests import User

# The folds of what a store holds out: training looks at the first one (section `validation` of the config).
FOLDS = ("validation", "test", "all")


def fold_of(query: str) -> str:
    """Returns the fold of a held-out query, "validation" or "test", each for half of the queries.

    A hash of the text decides, so a query has the same fold in every store. The hash is another one than that of
    `query_share`, which chooses the queries to hold out.
    """
    return FOLDS[hashlib.blake2b(query.encode(), digest_size=1).digest()[0] % 2]


@dataclasses.dataclass(frozen=True)
class Judgments:
    """The n queries that have a relevant item, with their judged items, users and slices.

    A query of several users counts once for each of them.

    Attributes:
        path: file that the judgments come from, for messages.
        queries: n texts.
        relevant: n lists of item ids, ascending.
        users: user of each query; None if the judgments have no users.
        grades: grade of every judged item of each query, relevant or not. If empty, each relevant item has grade 1.
        slices: name of a slicing -> the values of each query, in most cases one.
        unanswered: the queries without a relevant item: text, user, judged items.
        unknown_keys: text ids that are not in the corpus, by the numbers from -2 down that stand for them here.
    """

    path: Path
    queries: list[str]
    relevant: list[list[int]]
    users: list[User] | None = None
    grades: list[dict[int, float]] = dataclasses.field(default_factory=list)
    slices: dict[str, list[tuple[str, ...]]] = dataclasses.field(default_factory=dict)
    unanswered: list[tuple[str, User | None, list[int]]] = dataclasses.field(default_factory=list)
    unknown_keys: dict[int, str] = dataclasses.field(default_factory=dict)

    @staticmethod
    def read(
        path: Path,
        query: str,
        item: str,
        grade: str,
        relevant_from: float,
        user: str = "",
        time: str = "",
        slices: Sequence[str] = (),
        item_keys: Mapping[str, int] | None = None,
        user_keys: Mapping[str, int] | None = None,
    ) -> Judgments:
        """Reads a table of judged pairs. An item that is judged several times has the highest of its grades.

        Args:
            path: TSV, CSV, Parquet or JSON lines.
            query, item, grade: columns. If grade is "", every row is relevant and has grade 1.
            relevant_from: lowest grade that is relevant. A missing grade is not relevant.
            user: column of the user id, "" if there is none.
            time: column of the time in seconds since 1970, "" if there is none. The time of a user's query is that of
                its first row.
            slices: columns to slice by. A query has the values of its relevant rows.
            item_keys: text id -> item id, if the shop's item ids are texts.
            user_keys: text id -> user id, if the shop's user ids are texts. Other users are anonymous.

        Raises:
            UsageError: the file does not exist.
            CommandError: the file is unreadable, a column is missing, a time is not in seconds, or no item is relevant.
        """
        _check_file(path, "--judgments")
        texts: list[str] = [query, *slices]
        others: list[str] = []
        (others if item_keys is None else texts).append(item)
        others += [name for name in (grade, time) if name]
        if user:
            (others if user_keys is None else texts).append(user)
        table = Table(path, texts, others, "correct --query_column, --item_column, --grade_column or --slice")
        grades = table.numbers(grade, missing=-np.inf) if grade else np.full(len(table), max(1.0, relevant_from))
        columns = {name: table.text(name).to_pylist() for name in slices}
        items, unknown_keys = item_column(table, item, item_keys)
        users = _user_column(table, user, user_keys)
        times = table.numbers(time, 0, 2**32 - 1) if time else np.zeros(len(table))

        # Rows of the same query and user are one entry, with the first time, the highest grade of each item, and the
        # values of the slices.
        first: dict[tuple[str, int], int] = {}
        graded: dict[tuple[str, int], dict[int, float]] = {}
        values: dict[tuple[str, int], dict[str, dict[str, None]]] = {}
        rows = zip(table.text(query).to_pylist(), users.tolist(), items.tolist(), grades.tolist(), strict=True)
        for row, (text, user_id, item_id, row_grade) in enumerate(rows):
            first[text, user_id] = min(int(times[row]), first.get((text, user_id), 2**63))
            judged = graded.setdefault((text, user_id), {})
            judged[item_id] = max(row_grade, judged.get(item_id, -np.inf))
            if row_grade >= relevant_from:
                for name, column in columns.items():
                    values.setdefault((text, user_id), {}).setdefault(name, {})[column[row]] = None

        relevant = {
            asked: sorted(item_id for item_id, found in judged.items() if found >= relevant_from)
            for asked, judged in graded.items()
        }
        answered = [asked for asked, found in relevant.items() if found]
        if not answered:
            raise CommandError(
                f"{path}: no grade in column {grade} is {relevant_from:g} or more, so no query has a relevant item; "
                f"correct --grade_column or --relevant_from"
            )
        return Judgments(
            path,
            queries=[text for text, _ in answered],
            relevant=[relevant[asked] for asked in answered],
            users=[User(asked[1], first[asked] or None) for asked in answered] if user else None,
            grades=[graded[asked] for asked in answered],
            slices={name: [tuple(values[asked][name]) for asked in answered] for name in columns},
            unanswered=[
                (asked[0], User(asked[1], first[asked] or None) if user else None, sorted(graded[asked]))
                for asked, found in relevant.items()
                if not found
            ],
            unknown_keys=unknown_keys,
        )

    @staticmethod
    def of_held_out(store: Store, fold: str) -> Judgments:
        """Reads what the store held out of its log: every held-out item of a user's query is relevant.

        `fold` is one of FOLDS: the queries that training looks at, the others, or all.

        The time of a user's query is when the request of its first held-out interaction began. So a history has
        neither that interaction nor others of the same request.

        Raises:
            CommandError: the store has no held-out interactions, or none in this fold.
        """
        file = store.held_out()
        if file is None or not len(file["query"]):
            raise CommandError(
                f"{store.path}: holds no held-out interactions; set `held_out` in the schema and ingest the log again "
                f"(`dpsr evaluate` also takes judged queries, --judgments)"
            )
        query, user, item, time = (np.asarray(file[name], np.int64) for name in ("query", "user", "item", "time"))
        order = np.lexsort((item, user, query))
        query, user, item, time = query[order], user[order], item[order], time[order]
        texts, user_ids = list(store.queries()), store.users()["id"]
        if fold != "all":
            asked, row_of_asked = np.unique(query, return_inverse=True)
            inside = np.array([fold_of(texts[row]) == fold for row in asked.tolist()])[row_of_asked]
            if not inside.any():
                raise CommandError(
                    f"{store.path}: none of the {len(asked):,} held-out queries is in the fold '{fold}': a hash "
                    f"decides the fold of a query; hold out more of the log and ingest it again, or give --fold=all"
                )
            query, user, item, time = query[inside], user[inside], item[inside], time[inside]
        begins = np.flatnonzero(np.r_[True, (np.diff(query) != 0) | (np.diff(user) != 0)])
        first = np.minimum.reduceat(time, begins)
        item_ids = store.items()["id"][item]
        return Judgments(
            store.path / "held_out.dpsr",
            queries=[texts[row] for row in query[begins]],
            relevant=[np.unique(ids).tolist() for ids in np.split(item_ids, begins[1:])],
            users=[
                User(user_id, seconds or None)
                for user_id, seconds in zip(user_ids[user[begins]].tolist(), first.tolist(), strict=True)
            ],
        )

    def check_items(self, item_ids: np.ndarray) -> None:
        """Raises CommandError if a relevant item is not in the corpus."""
        judged = np.unique(np.concatenate([np.array(ids) for ids in self.relevant]))
        unknown = np.setdiff1d(judged, item_ids)
        if len(unknown):
            first = ", ".join(str(self.unknown_keys.get(i, i)) for i in unknown[:3].tolist())
            raise CommandError(
                f"{self.path}: {len(unknown):,} of {len(judged):,} relevant items are not in the store, first {first}; "
                f"give judgments of the items in this store, or --skip_unknown to ignore the others"
            )

    def only_known(self, item_ids: np.ndarray) -> tuple[Judgments, int]:
        """Returns the judgments of items that are in the corpus, and the number of the others."""
        known = set(item_ids.tolist())
        dropped = sum(item not in known for items in self._judged() for item in items)
        relevant = [[item for item in items if item in known] for items in self.relevant]
        if not any(relevant):
            raise CommandError(
                f"{self.path}: no relevant item is in the store; give judgments of the items in this store"
            )
        kept = dataclasses.replace(
            self,
            relevant=relevant,
            grades=[{item: grade for item, grade in grades.items() if item in known} for grades in self.grades],
            unanswered=[(text, user, [i for i in items if i in known]) for text, user, items in self.unanswered],
        )
        return kept.take([row for row, items in enumerate(relevant) if items]), dropped

    def _judged(self) -> list[list[int]]:
        of_answered = [list(grades) for grades in self.grades] if self.grades else self.relevant
        return [*of_answered, *(items for _, _, items in self.unanswered)]

    def take(self, rows: Sequence[int]) -> Judgments:
        """Returns the judgments of these queries only."""
        return dataclasses.replace(
            self,
            queries=[self.queries[row] for row in rows],
            relevant=[self.relevant[row] for row in rows],
            users=[self.users[row] for row in rows] if self.users else None,
            grades=[self.grades[row] for row in rows] if self.grades else [],
            slices={name: [values[row] for row in rows] for name, values in self.slices.items()},
        )

    def sample(self, count: int, seed: int) -> Judgments:
        """Returns a random sample of at most `count` queries, in their order, and the same share of `unanswered`."""
        if len(self.queries) <= count:
            return self
        rng = np.random.default_rng([seed, 0])
        rows = rng.choice(len(self.queries), count, replace=False)
        # The AUC counts both kinds, so their ratio must stay. Rounded up, so that some are left.
        share = -(-len(self.unanswered) * count // len(self.queries))
        others = np.sort(rng.choice(len(self.unanswered), share, replace=False)).tolist() if share else []
        sampled = self.take(np.sort(rows).tolist())
        return dataclasses.replace(sampled, unanswered=[self.unanswered[row] for row in others])

    def with_queries(self, path: Path, key: str, ask: str, slices: Sequence[str]) -> Judgments:
        """Joins a table with one row per query, which has other texts to ask or values to slice by.

        Args:
            path: the table.
            key: column of the query as it is in the judgments.
            ask: column of the text to ask instead of the query, "" to ask the query itself.
            slices: columns to slice by.

        Raises:
            UsageError: the file does not exist.
            CommandError: the file is unreadable, a column is missing, or a judged query is not in the table.
        """
        _check_file(path, "--queries")
        table = Table(
            path, [key, *([ask] if ask else []), *slices], [], "correct --key_column, --ask_column or --slice"
        )
        keys = table.text(key).to_pylist()
        row_of = {text: row for row, text in enumerate(keys)}
        asked_for = dict.fromkeys([*self.queries, *(text for text, _, _ in self.unanswered)])
        unknown = [text for text in asked_for if text not in row_of]
        if unknown:
            first = ", ".join(repr(text) for text in unknown[:3])
            raise CommandError(
                f"{self.path}: {len(unknown):,} of {len(asked_for):,} queries are not in {path}, first {first}; "
                f"give a table with a row for each query, or correct --key_column"
            )
        texts = table.text(ask).to_pylist() if ask else keys
        rows = [row_of[text] for text in self.queries]
        columns = {name: table.text(name).to_pylist() for name in slices}
        return dataclasses.replace(
            self,
            queries=[texts[row] for row in rows],
            slices=self.slices | {name: [(column[row],) for row in rows] for name, column in columns.items()},
            unanswered=[(texts[row_of[text]], user, items) for text, user, items in self.unanswered],
        )


def define_flags(values: flags.FlagValues, what: str) -> None:
    """Defines --judgments, whose help is `what`, and the flags that name its columns."""
    text = flags.DEFINE_string
    text("judgments", None, what, flag_values=values)
    text("query_column", "query", "column of --judgments with the query text", flag_values=values)
    text("item_column", "item", "column of --judgments with the item id", flag_values=values)
    text(
        "grade_column",
        "grade",
        "column of --judgments with the grade; if empty, every row is relevant",
        flag_values=values,
    )
    flags.DEFINE_float("relevant_from", 1.0, "lowest grade that counts as relevant", flag_values=values)


def read_flags(
    values: flags.FlagValues,
    item_keys: Mapping[str, int] | None,
    user_keys: Mapping[str, int] | None = None,
    user: str = "",
    time: str = "",
    slices: Sequence[str] = (),
) -> Judgments:
    """Reads the table that the flags of define_flags name; the other arguments are those of Judgments.read."""
    columns = (values.query_column, values.item_column, values.grade_column)
    return Judgments.read(
        Path(values.judgments), *columns, values.relevant_from, user, time, slices, item_keys, user_keys
    )


def _check_file(path: Path, flag: str) -> None:
    if not path.is_file():
        raise UsageError(f"{flag}={path}: is not a file" if path.exists() else f"{flag}={path}: no such file")
    check_kind(path)


def item_column(table: Table, column: str, keys: Mapping[str, int] | None) -> tuple[np.ndarray, dict[int, str]]:
    """Returns the item id of each row, int64 [rows], and the text ids that are not in `keys`, see `unknown_keys`."""
    if keys is None:
        return table.ids(column), {}
    unknown: dict[str, int] = {}
    # White space at the ends of an id does not count, as at ingest.
    ids = [
        keys[key] if key in keys else unknown.setdefault(key, -2 - len(unknown))
        for key in map(str.strip, table.text(column).to_pylist())
    ]
    return np.array(ids, np.int64), {number: key for key, number in unknown.items()}


def _user_column(table: Table, column: str, keys: Mapping[str, int] | None) -> np.ndarray:
    """Returns the user id of each row, int64 [rows]: -1, anonymous, without a column or for a key not in `keys`."""
    if not column:
        return np.full(len(table), -1)
    if keys is None:
        return table.ids(column, minimum=-1)
    return np.array([keys.get(key.strip(), -1) for key in table.text(column).to_pylist()], np.int64)
