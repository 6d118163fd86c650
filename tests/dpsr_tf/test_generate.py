"""The generated shop: each phenomenon that it promises is measured on its files, as anybody could read them."""

from __future__ import annotations

import collections
import csv
import dataclasses
import functools
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from dpsr_common import command_line
from dpsr_common.errors import UsageError
from dpsr_common.typed_config import to_dict
from dpsr_tf.data.schema import load_schema
from dpsr_tf.evaluation.baselines import Bm25, Field, unigrams
from dpsr_tf.shop import generate as g
from dpsr_tf.shop.log import Log, Rows
from dpsr_tf.shop.parameters import Parameters
from dpsr_tf.shop.world import World
from dpsr_tokenizer import Tokenizer, TokenizerConfig

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = [
    "interactions/part-00000.parquet",
    "items.parquet",
    "judgments.dev.tsv",
    "judgments.personal.tsv",
    "judgments.test.tsv",
    "labels.parquet",
    "schema.ranking.yaml",
    "schema.rewriting.yaml",
    "schema.yaml",
    "truth.json",
    "truth/items.parquet",
    "truth/labels.parquet",
    "truth/meanings.parquet",
    "truth/misspellings.parquet",
    "truth/queries.parquet",
    "truth/relevant.parquet",
    "truth/users.parquet",
    "users.parquet",
]
SMALL = ["--items=300", "--users=20", "--interactions=1000"]


class Written:
    """The files of a shop."""

    def __init__(self, path: Path):
        self.path = path
        self.truth = json.loads((path / "truth.json").read_text())

    @functools.cache  # noqa: B019
    def table(self, name: str) -> dict[str, np.ndarray]:
        """A Parquet file's columns, int, float or object [rows]."""
        table = pq.read_table(self.path / name)
        return {column: table[column].to_numpy() for column in table.column_names}

    @property
    def items(self) -> dict[str, np.ndarray]:
        return self.table("items.parquet")

    @property
    def users(self) -> dict[str, np.ndarray]:
        return self.table("users.parquet")

    @property
    def log(self) -> dict[str, np.ndarray]:
        return self.table("interactions")

    @functools.cached_property
    def clicks(self) -> dict[str, np.ndarray]:
        return {name: column[self.log["event"] == "click"] for name, column in self.log.items()}

    def item_rows(self, ids: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.items["item_id"], ids)  # the file is in the order of ids

    def user_rows(self, ids: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.users["user_id"], ids)

    @functools.cache  # noqa: B019
    def judgments(self, name: str) -> list[dict[str, str]]:
        with open(self.path / f"judgments.{name}.tsv", newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))

    def kinds(self, name: str) -> dict[str, str]:
        return {row["query"]: row["kind"] for row in self.judgments(name)}

    @functools.cached_property
    def relevant(self) -> dict[str, np.ndarray]:
        """The rows of the items that each text means, misspelt texts included."""
        pairs, queries = self.table("truth/relevant.parquet"), self.table("truth/queries.parquet")
        order = np.argsort(pairs["meaning"], kind="stable")
        splits = np.searchsorted(pairs["meaning"][order], np.arange(pairs["meaning"].max() + 2))
        rows = self.item_rows(pairs["item_id"][order])
        of = [rows[begin:end] for begin, end in itertools.pairwise(splits)]
        found = {
            query: np.unique(np.concatenate([of[meaning] for meaning in meanings]))
            for query, meanings in zip(queries["query"], queries["meanings"], strict=True)
        }
        misspelt = self.table("truth/misspellings.parquet")
        found.update((q, found[right]) for q, right in zip(misspelt["query"], misspelt["right"], strict=True))
        return found

    @functools.cached_property
    def retriever(self) -> Bm25:
        return Bm25(self.items["item_id"], [Field(self.items["title"].tolist())])

    @functools.cache  # noqa: B019
    def bm25(self, k: int) -> dict[str, float]:
        """recall@k of BM25 by kind of judged query, dev and test."""
        recall = collections.defaultdict(list)
        for fold in ("dev", "test"):
            relevant: dict[str, set[int]] = collections.defaultdict(set)
            for row in self.judgments(fold):
                if int(row["grade"]) > 0:
                    relevant[row["query"]].add(int(row["item"]))
            ids, _ = self.retriever(list(relevant), None, k)
            for (query, mine), found in zip(relevant.items(), ids, strict=True):
                recall[self.kinds(fold)[query]].append(len(mine & set(found.tolist())) / min(len(mine), k))
        return {kind: float(np.mean(values)) for kind, values in recall.items()}

    @functools.cached_property
    def purchase_ranks(self) -> dict[str, np.ndarray]:
        """Reciprocal rank of each item of judgments.personal.tsv among those relevant, by who ranks them."""
        rows = self.judgments("personal")
        users = self.user_rows(np.array([int(row["user_id"]) for row in rows]))
        bought = self.item_rows(np.array([int(row["item"]) for row in rows]))
        popularity = np.log(self.table("truth/items.parquet")["popularity"])
        liking = np.stack(self.table("truth/items.parquet")["liking"]) * self.truth["parameters"]["taste"]
        profile = self.table("truth/users.parquet")["profile"]
        seen = self._seen()
        ranks = collections.defaultdict(list)
        for row, user, item in zip(rows, users, bought, strict=True):
            c = self.relevant[row["query"]]
            everybody = popularity[c] + np.log(np.exp(liking[c]).mean(1))
            mine = popularity[c] + liking[c, profile[user]]
            scores = {
                "popular": np.where(np.arange(len(c)) >= 0, np.log1p(self.items["sales"][c]), 0),
                "blind": everybody,
                "profile": mine,
                "counted": mine + self._counted(seen, user, c),
                "taste": mine + self.truth["parameters"]["history"] * self._latent(user, c),
            }
            at = int(np.flatnonzero(c == item)[0])
            for name, score in scores.items():
                ranks[name].append(1 / (1 + (score > score[at]).sum()))
        return {name: np.array(values) for name, values in ranks.items()}

    def _latent(self, user: int, items: np.ndarray) -> np.ndarray:
        """The taste that no profile shows, by the truth tables and the formula of docs/generated_shop.md."""
        taste = {name: column[user] for name, column in self.table("truth/users.parquet").items()}
        true, weight = self.table("truth/items.parquet"), self.truth["taste_weights"]
        place, style = true["category_place"][items], true["style_place"][items]
        brand = np.array(taste["brands"])[place] == self.items["brand"][items]
        shop = np.array(taste["shops"])[place] == self.items["shop"][items]
        same = (style >= 0) & (np.array(taste["styles"])[style] == true["style"][items])
        return weight["brand"] * brand + weight["shop"] * shop + weight["style"] * same

    def _seen(self) -> list[tuple[np.ndarray, ...]]:
        """What the log says of each user's brands, shops and styles: codes, groups, clicks of both, expected shares."""
        users, items = self.user_rows(self.clicks["user_id"]), self.item_rows(self.clicks["item_id"])
        true, category = self.table("truth/items.parquet"), self.items["category"]
        style = [f"{language} {place}" for language, place in zip(true["language"], true["style_place"], strict=True)]
        seen = []
        for values, groups in (
            (self.items["brand"], category),
            (self.items["shop"], category),
            (true["style"].astype(str), style),
        ):
            group = np.unique(groups, return_inverse=True)[1]
            pairs = [f"{a} {b}" for a, b in zip(group, values, strict=True)]
            code = np.unique(pairs, return_inverse=True)[1]
            of_code = np.zeros((len(self.users["user_id"]), code.max() + 1))
            np.add.at(of_code, (users, code[items]), 1)
            of_group = np.zeros((len(of_code), group.max() + 1))
            np.add.at(of_group, (users, group[items]), 1)
            share = (of_code.sum(0)[code] + 0.5) / (of_group.sum(0)[group] + 1)
            seen.append((code, group, of_code, of_group, share))
        return seen

    def _counted(self, seen: list[tuple[np.ndarray, ...]], user: int, items: np.ndarray) -> Any:
        """The latent taste as the log shows it: what was clicked more often than expected."""
        return sum(
            np.log((of_code[user, code[items]] + 5 * share[items]) / (of_group[user, group[items]] + 5) / share[items])
            for code, group, of_code, of_group, share in seen
        )


@pytest.fixture(scope="module", params=[1, 7, 12])
def shop(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    out = tmp_path_factory.mktemp("generate") / "shop"
    assert command_line.main(["generate", f"--out={out}", f"--seed={request.param}"]) == 0
    return Written(out)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The shop of seed 1."""
    out = tmp_path_factory.mktemp("generate") / "shop"
    assert command_line.main(["generate", f"--out={out}"]) == 0
    return Written(out)


def worlds(**parameters: Any) -> World:
    return World(Parameters(**parameters))


def shown(log: dict[str, np.ndarray]) -> np.ndarray:
    """The rows of shown items, one per place of a list, without carts and orders."""
    return np.isin(log["event"], ["impression", "skip", "click"])


# The files.


def test_files_and_columns(one: Written) -> None:
    assert sorted(str(p.relative_to(one.path)) for p in one.path.rglob("*") if p.is_file()) == FILES
    assert list(one.items) == ["item_id", "title", "brand", "category", "shop", "price", "in_stock", "sales"]
    assert list(one.users) == ["user_id", "gender", "age", "purchase_power", "city"]
    assert list(one.log) == ["query", "user_id", "item_id", "event", "time", "session", "position"]
    schema = pq.read_schema(one.path / "interactions" / "part-00000.parquet")
    types = [str(schema.field(name).type) for name in one.log]
    assert types == ["string", "int64", "int64", "string", "int64", "int64", "int32"]
    counts = one.truth["counts"]
    assert (len(one.items["item_id"]), len(one.users["user_id"]), len(one.clicks["query"])) == (3_000, 500, 30_000)
    assert (counts["items"], counts["users"], counts["interactions"]) == (3_000, 500, 30_000)
    for name, number in collections.Counter(one.log["event"].tolist()).items():
        assert counts[f"{name}s"] == number
    assert counts["rows"] == len(one.log["query"]) and counts["queries"] == len(set(one.log["query"].tolist()))
    for table, name in ((one.items, "item_id"), (one.users, "user_id")):
        assert (np.diff(table[name]) > 0).all()
        assert np.isin(one.log[name], table[name]).all()
    chinese = np.mean([any("\u4e00" <= c <= "\u9fff" for c in title) for title in one.items["title"]])
    assert chinese == pytest.approx(1 / 3, abs=0.001)
    assert (one.items["price"] > 0).all() and one.items["in_stock"].mean() > 0.9
    assert set(one.users["gender"]) == {"female", "male"} and set(one.users["purchase_power"]) == {
        "low",
        "middle",
        "high",
    }
    assert one.users["age"].min() >= 18 and one.users["age"].max() <= 75


def test_same_flags_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        assert command_line.main(["generate", f"--out={tmp_path / name}", f"--seed={seed}", *SMALL]) == 0
    for name in FILES:
        first, second, other = ((tmp_path / shop / name).read_bytes() for shop in "abc")
        assert first == second, name
        assert (first == other) == name.startswith("schema."), name


def test_the_log_in_batches(tmp_path: Path) -> None:
    """Three batches: exactly as many clicks, in the order of time, no session or request torn."""
    world = worlds(interactions=70_000)
    log = Log(world)
    batches = list(log.batches())
    assert len(batches) == 3
    time = np.concatenate([rows.time for rows in batches])
    session = np.concatenate([rows.session for rows in batches])
    event = np.concatenate([rows.event for rows in batches])
    assert (np.diff(time) >= 0).all() and (event == 2).sum() == 70_000 == log.user_clicks.sum()
    assert len(np.unique(session)) == log.sessions
    order = np.argsort(session, kind="stable")
    same = session[order][1:] == session[order][:-1]
    user = np.concatenate([rows.user for rows in batches])[order]
    assert (user[1:] == user[:-1])[same].all()
    first = np.flatnonzero(np.append(True, ~same))
    length = np.maximum.reduceat(time[order], first) - np.minimum.reduceat(time[order], first)
    assert length.max() < 3600


@pytest.mark.long
def test_memory_does_not_grow_with_the_log(tmp_path: Path) -> None:
    peak = []
    for clicks in (33_000, 330_000):
        out = tmp_path / str(clicks)
        script = (
            "import resource, sys; from dpsr_common import command_line; assert command_line.main(sys.argv[1:]) == 0;"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        command = [sys.executable, "-c", script, "generate", f"--out={out}", f"--interactions={clicks}"]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        peak.append(int(output.splitlines()[-1]))
        assert sum(pq.read_metadata(path).num_rows for path in out.glob("interactions/*.parquet")) > 5 * clicks
    assert peak[1] < 1.25 * peak[0], peak


def test_ingests(one: Written, tmp_path: Path) -> None:
    from dpsr_tf.data.store import Store

    schema = load_schema(one.path / "schema.yaml")
    assert schema.interactions.session and schema.interactions.position and schema.items.popularity == "sales"
    store = tmp_path / "store"
    flags = [f"--schema={one.path / 'schema.yaml'}", f"--out={store}", "--max_reject_fraction=0"]
    assert command_line.main(["ingest", *flags]) == 0
    counts, made = one.truth["counts"], Store(store)
    assert len(made.items()["id"]) == 3_000
    positives = counts["clicks"] + counts["carts"] + counts["orders"]
    assert sum(len(shard["positive.item"]) for shard in made.interactions()) == positives
    features = json.loads((store / "manifest.json").read_text())["features"]
    assert [feature["name"] for feature in features["items"]] == ["brand", "category", "shop", "price", "in_stock"]
    assert [feature["name"] for feature in features["users"]] == ["gender", "age", "purchase_power", "city"]
    assert len(made.users()["event.item"]) == positives


# Queries.


def test_judged_queries_are_not_in_the_log(shop: Written) -> None:
    log, dev, test = set(shop.log["query"].tolist()), shop.kinds("dev"), shop.kinds("test")
    assert not log & set(dev) and not log & set(test) and not set(dev) & set(test)
    for fold, kinds in (("dev", dev), ("test", test)):
        count = collections.Counter(kinds.values())
        assert {f"judged_{fold}_{kind}": n for kind, n in count.items()}.items() <= shop.truth["counts"].items()
        assert count["plain"] >= 100 and count["gap"] >= 40 and count["partial"] >= 40
        assert count["typo"] >= 40 and count["polysemous"] >= 8


def test_no_other_phrasing_of_a_judged_query_is_in_the_log(shop: Written) -> None:
    queries = shop.table("truth/queries.parquet")
    meanings = dict(zip(queries["query"], (set(m) for m in queries["meanings"]), strict=True))
    misspelt = shop.table("truth/misspellings.parquet")
    meanings.update((q, meanings[right]) for q, right in zip(misspelt["query"], misspelt["right"], strict=True))
    folds = [set().union(*(meanings[q] for q in queries)) for queries in (set(shop.log["query"].tolist()),
             shop.kinds("dev"), shop.kinds("test"))]  # fmt: skip
    assert not folds[0] & folds[1] and not folds[0] & folds[2] and not folds[1] & folds[2]
    assert shop.table("truth/meanings.parquet")["fold"][list(folds[1])].tolist() == ["dev"] * len(folds[1])
    # The same, without the truth tables: each synonym becomes the shop's own word.
    words = {
        phrase: word
        for table in shop.truth["synonyms"].values()
        for word, phrases in table.items()
        for phrase in phrases
    }

    def meaning(query: str) -> str:
        for phrase in sorted(words, key=len, reverse=True):
            query = query.replace(phrase, words[phrase])
        return " ".join(sorted(query.split() if query.isascii() else query))

    assert meaning("wellies for my husband") == meaning("men boots") != meaning("women boots")
    logged = {meaning(query) for query in set(shop.log["query"].tolist())}
    judged = {meaning(query) for query, kind in shop.kinds("dev").items() if kind != "typo"}
    assert len(judged) > 100 and not judged & logged


def test_judged_items(shop: Written) -> None:
    for fold in ("dev", "test"):
        pairs = [(row["query"], int(row["item"])) for row in shop.judgments(fold)]
        assert len(set(pairs)) == len(pairs)
        assert {row["grade"] for row in shop.judgments(fold)} == {"0", "3"}
        found: dict[tuple[str, str], set[int]] = collections.defaultdict(set)
        for row in shop.judgments(fold):
            found[row["query"], row["grade"]].add(int(shop.item_rows(np.array([int(row["item"])]))[0]))
        for query in shop.kinds(fold):
            relevant = set(shop.relevant[query].tolist())
            right, wrong = found[query, "3"], found[query, "0"]
            assert right <= relevant and len(right) == min(len(relevant), 50) and not wrong & relevant, query


def test_plain_queries_mean_what_their_words_say(shop: Written) -> None:
    """Brand column and title of a judged item hold every word of a plain English query."""
    checked = 0
    for row in shop.judgments("dev"):
        if row["kind"] == "plain" and row["grade"] == "3" and row["query"].isascii():
            item = shop.item_rows(np.array([int(row["item"])]))[0]
            words = f"{shop.items['title'][item]} {shop.items['brand'][item]}".lower().split()
            assert set(row["query"].split()) <= set(words), row
            checked += 1
    assert checked > 200


def test_synonyms_stand_in_no_title(shop: Written) -> None:
    """No word of an English synonym, and no two neighbouring characters of a Chinese one, is in any title."""
    tokenizer = Tokenizer(TokenizerConfig(letter_trigrams=False, char_unigrams=False))
    in_titles = {token for title in shop.items["title"] for token in tokenizer.tokenize(title)}
    in_log = "\n".join(sorted(set(shop.log["query"].tolist())))
    phrases = [phrase for words in shop.truth["synonyms"].values() for entries in words.values() for phrase in entries]
    assert len(phrases) > 60
    for phrase in phrases:
        tokens = set(tokenizer.tokenize(phrase))
        assert tokens and not tokens & in_titles, (phrase, tokens & in_titles)
        assert phrase in in_log, "a synonym that nobody uses cannot be learnt"
    for query, kind in shop.kinds("dev").items():
        if kind != "typo":
            assert any(phrase in query for phrase in phrases) == (kind in ("gap", "partial")), query


def test_a_gap_query_shares_no_token_with_what_it_means(shop: Written) -> None:
    """No word, Chinese character or pair of them; a partial query shares some with all of it."""
    tokenize = unigrams()
    titles = [set(tokenize(title)) for title in shop.items["title"]]
    queries = shop.table("truth/queries.parquet")
    counts: collections.Counter[str] = collections.Counter()
    for query, kind in zip(queries["query"], queries["kind"], strict=True):
        tokens = set(tokenize(query))
        if kind == "gap":
            assert not any(tokens & titles[row] for row in shop.relevant[query]), query
        elif kind == "partial":
            assert all(tokens & titles[row] for row in shop.relevant[query]), query
        counts[kind] += 1
    assert counts["gap"] > 300 and counts["partial"] > 1_000


def test_invented_brands_stay_clear_of_synonyms() -> None:
    world = worlds(items=6_000, invented_brands=50)
    tokenizer = Tokenizer(TokenizerConfig(letter_trigrams=False, char_unigrams=False))
    in_titles = {token for title in world.items.titles for token in tokenizer.tokenize(title)}
    entries = [*world.catalogue.types, *world.catalogue.words]
    for phrase in (phrase for entry in entries for phrase in entry.synonyms):
        assert not set(tokenizer.tokenize(phrase)) & in_titles, phrase
    assert len(set(world.catalogue.brands)) == len(world.catalogue.brands) > 14 * 50


# A harder shop.

HARD = {"types": 500, "titled_synonyms": 0.02, "rare_synonyms": 0.5, "unasked_synonyms": 0.5}


@pytest.fixture(scope="module")
def hard(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A shop with many types, rare synonyms, and synonyms in titles."""
    out = tmp_path_factory.mktemp("generate") / "hard"
    flags = [f"--set={name}={value}" for name, value in HARD.items()]
    assert command_line.main(["generate", f"--out={out}", "--items=4000", *flags]) == 0
    return Written(out)


@pytest.mark.long
def test_number_of_types() -> None:
    counts = {types: len(worlds(types=types).catalogue.types) for types in (58, 300, 560)}
    assert counts == {58: 58, 300: 300, 560: 560}
    low, high = (Parameters.__dataclass_fields__["types"].metadata[bound] for bound in ("minimum", "maximum"))
    assert (low, high) == (58, 560)
    few, many, other = (worlds(types=types, seed=seed).catalogue.types for types, seed in ((58, 1), (300, 1), (300, 2)))
    assert set(few) < set(many) and set(few) < set(other) and set(many) != set(other)


def test_names_of_all_types_are_clear() -> None:
    """No two types share a word or a synonym, and synonyms stand in no title, as among the lexicon's own types."""
    world = worlds(types=560, items=12_000, users=10)
    types, tokenizer = world.catalogue.types, Tokenizer(TokenizerConfig(letter_trigrams=False, char_unigrams=False))
    names = [name for t in types for name in (t.word, *t.synonyms)]
    assert len(set(names)) == len(names) and len({code for code in world.items.type}) == 560
    in_titles = {token for title in world.items.titles for token in tokenizer.tokenize(title)}
    for phrase in (phrase for entry in (*types, *world.catalogue.words) for phrase in entry.synonyms):
        assert not set(tokenizer.tokenize(phrase)) & in_titles, phrase
    tokenize = unigrams()
    titles = [set(tokenize(title)) for title in world.items.titles]
    gaps = np.flatnonzero(world.text_gap == 2)
    assert len(gaps) > 1_000
    for text in gaps:
        tokens = set(tokenize(world.texts[text]))
        assert not any(tokens & titles[row] for row in world.answer_rows(int(world.text_answer[text]))), text


def test_judgments_of_a_harder_shop(hard: Written) -> None:
    test_judged_queries_are_not_in_the_log(hard)
    test_judged_items(hard)
    recall = hard.bm25(100)
    assert recall["plain"] > 0.9 and recall["gap"] < 0.2, "BM25 finds the few items whose titles hold a synonym"


def test_some_synonyms_stand_in_few_titles(hard: Written) -> None:
    synonyms = {word: mine for words in hard.truth["synonyms"].values() for word, mine in words.items()}
    kinds = hard.table("truth/items.parquet")["type"]
    by_synonym = sum(
        any(phrase in title.lower() for phrase in synonyms.get(kind, []))
        for kind, title in zip(kinds, hard.items["title"], strict=True)
    )
    assert 0.01 * len(kinds) < by_synonym < 0.03 * len(kinds)
    # Every other title holds the word itself.
    by_word = sum(kind in title.lower() for kind, title in zip(kinds, hard.items["title"], strict=True))
    assert by_word + by_synonym >= len(kinds)


def test_homonyms_stand_in_no_title_and_are_asked() -> None:
    world = worlds(homonyms=12, titled_synonyms=0.5, rare_synonyms=1, unasked_synonyms=1)
    titles = "\n".join(world.items.titles).lower()
    assert not [word for word in world.catalogue.homonyms if word in titles]
    asked = {world.texts[text] for text in world.pair_text[world.pair_weight > 0]}
    assert world.catalogue.homonyms.keys() <= asked


def test_unasked_synonyms_are_judged_but_not_in_the_log(hard: Written) -> None:
    queries, log = hard.table("truth/queries.parquet"), set(hard.log["query"].tolist())
    kind_of = hard.table("truth/meanings.parquet")["type"]
    unasked = {word: mine for words in hard.truth["unasked_synonyms"].values() for word, mine in words.items()}
    rows = {
        query: [
            phrase for meaning in meanings for phrase in unasked.get(kind_of[meaning], []) if phrase in query
        ]
        for query, meanings in zip(queries["query"], queries["meanings"], strict=True)
    }  # fmt: skip
    assert sum(map(bool, rows.values())) > 1_000
    assert not [query for query in log if rows.get(query)]
    judged = [bool(rows[query]) for query, kind in hard.kinds("dev").items() if kind == "gap"]
    assert 0.5 < np.mean(judged) < 1
    # The log holds the words of some of them, for other types. It does not hold the words of others at all.
    words = collections.Counter(word for query in log for word in query.split())
    phrases = {phrase for mine in unasked.values() for phrase in mine if phrase.isascii() and " " in phrase}
    known = [all(words[word] for word in phrase.split()) for phrase in phrases]
    assert 5 < sum(known) < 0.5 * len(known)


def check_bm25(shop: Written) -> None:
    recall, deep = shop.bm25(10), shop.bm25(100)
    assert recall["plain"] > 0.9
    assert recall["gap"] < 0.15 and deep["gap"] < 0.5
    assert recall["partial"] < recall["plain"] - 0.35 and deep["partial"] > deep["gap"] + 0.3
    assert recall["typo"] < recall["plain"] - 0.06


def test_bm25_fails_where_it_should(shop: Written) -> None:
    check_bm25(shop)


def test_bm25_fails_in_a_larger_shop(tmp_path: Path) -> None:
    flags = ["--seed=424242", "--items=4000", "--users=800", "--interactions=40000"]
    assert command_line.main(["generate", f"--out={tmp_path / 'shop'}", *flags]) == 0
    check_bm25(Written(tmp_path / "shop"))


def test_a_log_teaches_the_words_of_gap_queries(shop: Written) -> None:
    """Each synonym of a judged gap query is asked, and its items clicked, in queries of the log."""
    phrases = [phrase for words in shop.truth["synonyms"].values() for mine in words.values() for phrase in mine]
    clicks = collections.Counter(shop.clicks["query"].tolist())
    for fold in ("dev", "test"):
        for query, kind in shop.kinds(fold).items():
            mine = [phrase for phrase in phrases if phrase in query] if kind == "gap" else []
            assert kind != "gap" or len(mine) >= 2, query
            for phrase in mine:
                assert sum(n for q, n in clicks.items() if phrase in q) >= 20, (query, phrase)


def test_a_popularity_ranker_fails(shop: Written) -> None:
    best = set(np.argsort(-shop.items["sales"])[:100].tolist())
    recall = [len(best & set(shop.relevant[q].tolist())) / len(shop.relevant[q]) for q in shop.kinds("dev")]
    assert np.mean(recall) < 0.15
    sales, clicks = shop.items["sales"], np.bincount(shop.item_rows(shop.clicks["item_id"]), minlength=3_000)
    assert 0.3 < rank_correlation(sales, clicks) < 0.95, "and yet popularity says something"


def test_polysemous_words(shop: Written) -> None:
    for language, word in (("en", "apple"), ("zh", "苹果")):
        assert word in shop.truth["polysemous"][language]
        rows = shop.relevant[word]
        brands, types = shop.items["brand"][rows], shop.table("truth/items.parquet")["type"][rows]
        assert (brands == word).any() and (types == word).any() and not ((brands == word) & (types == word)).any()
    for words in shop.truth["brands_across_categories"].values():
        for brand, categories in words.items():
            assert len(categories) > 1 and set(categories) <= set(shop.items["category"][shop.relevant[brand]])


def test_shared_brands_make_polysemous_queries() -> None:
    few, many = worlds(items=3_000, invented_brands=3), worlds(items=3_000, invented_brands=3, shared_brands=3)
    catalogue = many.catalogue
    for language in (0, 1):
        mine = np.flatnonzero(catalogue.category_language == language)
        for before, after in itertools.pairwise(mine):
            shared = set(catalogue.category_brands[before][-6:]) & set(catalogue.category_brands[after][-3:])
            assert len(shared) == 3, (catalogue.categories[before].name, catalogue.categories[after].name)
        assert not set(catalogue.category_brands[mine[-1]][-3:]) & set(catalogue.category_brands[mine[0]])
    counts = [world.polysemous.sum() for world in (few, many)]
    assert counts[1] > 2 * counts[0]
    held_out = many.polysemous & (many.text_fold > 0)
    assert held_out.sum() > 40 and (many.polysemous & (many.text_fold == 0)).sum() > 100


def test_homonyms_mean_two_types_and_stand_in_no_title() -> None:
    plain, world = worlds(items=3_000), worlds(items=3_000, homonyms=12)
    assert world.items.titles == plain.items.titles
    texts = dict(zip(world.texts, world.senses, strict=True))
    words = {word.lower() for title in world.items.titles for word in title.split()}
    types = [t.word for t in world.catalogue.types]
    assert len(world.catalogue.homonyms) == 12 and not plain.catalogue.homonyms
    for word, meant in world.catalogue.homonyms.items():
        senses = world.meaning[texts[word]]
        assert word not in words and {types[code] for code in senses[:, 1]} == set(meant)
        assert len(set(senses[:, 0])) == 2, "of different categories"
        assert (senses[:, 2:] < 0).all() and (world.fold[texts[word]] == 0).all()
    held_out = [text for text, senses in texts.items() if len(senses) == 2 and world.fold[senses[0]] > 0]
    assert any(text.split()[-1] in world.catalogue.homonyms for text in held_out)


def test_who_asks_decides_between_meanings() -> None:
    """For "apple", users whose favourite category has phones click phones, and users who buy food click fruit."""
    world = worlds(interactions=150_000)
    rows = Rows.join(list(Log(world).batches()))
    word = world.texts.index("apple")
    asked = (rows.text == word) & (rows.event == 2)
    is_brand = world.items.brand[rows.item] == world.catalogue.brands.index("apple")
    places = [category.name for category in world.catalogue.languages[0].categories]
    phones, food = (
        (world.users.categories == places.index(name)).any(1)[rows.user] for name in ("electronics", "food")
    )
    assert (asked & phones & ~food).sum() > 20 and (asked & food & ~phones).sum() > 20
    assert is_brand[asked & phones & ~food].mean() > is_brand[asked & food & ~phones].mean() + 0.4


def test_accessories_mislead(shop: Written) -> None:
    cases = np.flatnonzero(["Cell Phone Case" in title for title in shop.items["title"]])
    assert len(cases) > 15 and shop.truth["misleading"]["en"]["cell phone"] == ["cell phone case"]
    for title in shop.items["title"][cases]:
        assert title.partition(" Fits ")[2].split()[1:3] == ["Cell", "Phone"], title
    assert not set(cases) & set(shop.relevant["cell phone"])
    ids, _ = shop.retriever(["cell phone"], None, 10)
    assert np.isin(shop.item_rows(ids[0]), cases).mean() > 0.5, "and so they mislead BM25"
    # Such items are shown, and seldom clicked.
    log, kind = shop.log, shop.table("truth/items.parquet")["type"]
    misleads, answers = np.zeros(len(log["query"]), bool), np.zeros(len(log["query"]), bool)
    type_of_row = kind[shop.item_rows(log["item_id"])]
    for words in shop.truth["misleading"].values():
        for word, others in words.items():
            here = shown(log) & (log["query"] == word)
            misleads |= here & np.isin(type_of_row, others)
            answers |= here & (type_of_row == word)
    assert misleads.sum() > 100
    clicked = log["event"] == "click"
    assert clicked[misleads].mean() < 0.35 * clicked[answers].mean()


def test_misspelt_queries(shop: Written) -> None:
    right, wrong = set(shop.table("truth/queries.parquet")["query"]), shop.table("truth/misspellings.parquet")
    assert not right & set(wrong["query"]) and len(set(wrong["query"])) == len(wrong["query"])
    queries = shop.table("truth/queries.parquet")
    requests = wrong["requests"].sum() / (wrong["requests"].sum() + queries["requests"].sum())
    assert 0.025 < requests < 0.045  # a few texts cannot be misspelt
    assert wrong["requests"].sum() + queries["requests"].sum() == shop.truth["counts"]["requests"]
    of = dict(zip(wrong["query"], wrong["right"], strict=True))
    for query in set(shop.log["query"].tolist()) - right:
        assert abs(len(query) - len(of[query])) <= 1 and query != of[query]


def test_noise_and_typos_can_be_turned_off() -> None:
    world = worlds(interactions=3_000, noise=0, typo_share=0)
    for rows in Log(world).batches():
        assert (rows.text < len(world.texts)).all()
        for text, item in zip(rows.text[rows.event >= 2], rows.item[rows.event >= 2], strict=True):
            assert item in world.answer_rows(int(world.text_answer[text]))


def test_clicks_are_relevant_but_for_the_noise(shop: Written) -> None:
    relevant = {query: set(rows.tolist()) for query, rows in shop.relevant.items()}
    pairs = zip(shop.clicks["query"], shop.item_rows(shop.clicks["item_id"]).tolist(), strict=True)
    right = np.mean([item in relevant[query] for query, item in pairs])
    assert 0.93 < right < 0.999


def zipf_exponent(values: np.ndarray, ranks: int) -> float:
    count = np.sort(np.unique(values, return_counts=True)[1])[::-1][:ranks]
    return float(-np.polyfit(np.log(np.arange(1, len(count) + 1)), np.log(count), 1)[0])


def test_long_tails(shop: Written) -> None:
    assert 0.55 < zipf_exponent(shop.clicks["query"].astype(str), 300) < 1.1
    queries = shop.table("truth/queries.parquet")
    share = {
        segment: (queries["segment"] == segment)[queries["requests"] > 0].mean()
        for segment in ("head", "torso", "tail")
    }
    assert share["head"] < 0.05 and share["tail"] > 0.6, share
    clicks = np.sort(np.bincount(shop.item_rows(shop.clicks["item_id"]), minlength=3_000))[::-1]
    assert clicks[:300].sum() > 0.28 * clicks.sum() and clicks[1_500:].sum() < 0.25 * clicks.sum()
    users = np.sort(np.bincount(shop.user_rows(shop.clicks["user_id"]), minlength=500))[::-1]
    assert users[:50].sum() > 2 * users[-250:].mean() * 50


# Users.


def test_profile_changes_what_is_clicked_for_the_same_query(shop: Written) -> None:
    items, users = shop.item_rows(shop.clicks["item_id"]), shop.user_rows(shop.clicks["user_id"])
    gender, power = shop.users["gender"][users], shop.users["purchase_power"][users]
    # Of the same text, so that it is not the query that differs: its clicks by one group against those by the other.
    text = np.unique(shop.clicks["query"].astype(str), return_inverse=True)[1]

    def difference(value: np.ndarray, group: np.ndarray) -> float:
        """Mean of `value` in the group less that outside, within each text, weighted by what the smaller side has."""
        total = weight = 0.0
        inside, outside = np.bincount(text, group), np.bincount(text, ~group)
        a, b = np.bincount(text, value * group), np.bincount(text, value * ~group)
        both = (inside > 0) & (outside > 0)
        small = np.minimum(inside, outside)[both]
        total = ((a[both] / inside[both] - b[both] / outside[both]) * small).sum()
        weight = small.sum()
        return float(total / weight)

    words = [set(title.lower().split()) for title in shop.items["title"]]
    for mine, word in (("female", "pink"), ("male", "navy"), ("male", "black")):
        has = np.array([word in w for w in words])[items].astype(float)
        assert difference(has, gender == mine) > 0.01, word
    level = shop.table("truth/items.parquet")["level"][items]
    assert difference(level, power == "high") > 0.1 and difference(level, power == "low") < -0.1


def test_user_aware_oracles_win(shop: Written) -> None:
    ranks = {name: values.mean() for name, values in shop.purchase_ranks.items()}
    assert len(shop.purchase_ranks["blind"]) > 900
    assert ranks["popular"] < ranks["profile"]
    assert ranks["profile"] > ranks["blind"] + 0.03, ranks
    assert ranks["taste"] > ranks["profile"] + 0.08, ranks
    assert ranks["counted"] > ranks["profile"] + 0.025, ranks


def test_purchases(shop: Written) -> None:
    times = [int(row["time"]) for row in shop.judgments("personal")]
    assert times == sorted(times) and shop.truth["log_ends"] <= times[0] and times[-1] < shop.truth["log_ends"] + 86_400
    assert shop.log["time"].max() < shop.truth["log_ends"]
    logged = collections.Counter(shop.clicks["user_id"].tolist())
    for row in shop.judgments("personal"):
        item = shop.item_rows(np.array([int(row["item"])]))[0]
        assert item in shop.relevant[row["query"]] and shop.items["in_stock"][item]
        assert logged[int(row["user_id"])] >= 3


def test_taste_counts_for_nothing_where_it_is_turned_off() -> None:
    world = worlds(items=1_000, taste=0, history=0)
    user, item = np.arange(500)[:, None], np.arange(1_000)
    np.testing.assert_array_equal(world.appeal(user, item), np.zeros((500, 1_000)))
    world = worlds(items=1_000, history=0)
    same = world.users.profile == world.users.profile[0]
    np.testing.assert_array_equal(np.ptp(world.appeal(np.flatnonzero(same)[:, None], item), axis=0), np.zeros(1_000))
    world = worlds(items=1_000)
    assert np.ptp(world.appeal(np.flatnonzero(same)[:, None], item), axis=0).mean() > 1


def test_latent_taste_is_not_in_the_profile(shop: Written) -> None:
    """Users of one gender, age and power, from one city, differ in what they favour as much as any two."""
    taste = np.stack(shop.table("truth/users.parquet")["brands"][shop.table("truth/users.parquet")["language"] == "en"])
    profile = shop.table("truth/users.parquet")["profile"][shop.table("truth/users.parquet")["language"] == "en"]
    equal = (taste[:, None] == taste[None]).mean(2)
    other = ~np.eye(len(taste), dtype=bool)
    same = (profile[:, None] == profile[None]) & other
    assert abs(equal[same].mean() - equal[other].mean()) < 0.03


def test_a_session_has_an_intent(shop: Written) -> None:
    """Two clicks of one session in one type share their brand more often than two of one user in different sessions."""
    clicks = shop.clicks
    items, users = shop.item_rows(clicks["item_id"]), shop.user_rows(clicks["user_id"])
    kind = np.unique(shop.table("truth/items.parquet")["type"].astype(str), return_inverse=True)[1][items]
    brand = np.unique(shop.items["brand"].astype(str), return_inverse=True)[1][items]
    order = np.lexsort((clicks["time"], kind, users))
    a, b = order[:-1], order[1:]
    # Of different queries, so that it is not the words that make them alike.
    pairs = (users[a] == users[b]) & (kind[a] == kind[b]) & (clicks["query"][a] != clicks["query"][b])
    same = clicks["session"][a] == clicks["session"][b]
    equal = brand[a] == brand[b]
    assert (pairs & same).sum() > 500
    assert equal[pairs & same].mean() > equal[pairs & ~same].mean() + 0.1


# Lists.


def test_lists_and_what_becomes_of_them(shop: Written) -> None:
    log = shop.log
    listed = shown(log)
    assert log["position"].min() == 1 and log["position"].max() == 8
    # An impression has its request's time: rows of one request that were not clicked are at one time.
    key = np.array([f"{s} {q}" for s, q in zip(log["session"], log["query"], strict=True)])
    keys, code = np.unique(key, return_inverse=True)
    highest = np.zeros(len(keys), int)
    clicked = log["event"] == "click"
    np.maximum.at(highest, code[clicked], log["position"][clicked])
    requests = shop.truth["counts"]["requests"]
    assert len(keys) <= requests < 1.05 * len(keys)  # now and then a session comes back to a query
    once = np.bincount(code[listed & (log["position"] == 1)], minlength=len(keys)) == 1
    for event, expected in (("skip", True), ("impression", False)):
        rows = (log["event"] == event) & once[code]
        assert ((log["position"] < highest[code])[rows] == expected).all()
    pair = np.array([f"{k} {i}" for k, i in zip(code, log["item_id"], strict=True)])
    first = {name: set(pair[log["event"] == name].tolist()) for name in ("click", "cart", "order")}
    assert first["order"] <= first["cart"] <= first["click"]
    assert len(first["order"]) > 1_000
    assert len(set(pair[listed & once[code]].tolist())) == (listed & once[code]).sum()


def test_position_bias(shop: Written) -> None:
    log = shop.log
    rows = shown(log)
    rate = (
        np.bincount(log["position"][rows], log["event"][rows] == "click")[1:] / np.bincount(log["position"][rows])[1:]
    )
    assert (np.diff(rate) < 0).all() and rate[-1] < 0.35 * rate[0]


def test_propensities_are_what_shuffled_lists_show() -> None:
    log = Log(worlds(interactions=98_304, shuffled_share=1, position_exponent=0.9))
    rows = Rows.join(list(log.batches()))
    # Of whole lists: short ones are those of narrow queries, which are clicked more.
    session = np.unique(rows.session, return_inverse=True)[1]
    request = np.unique(session * (rows.text.max() + 1) + rows.text, return_inverse=True)[1]
    length = np.zeros(request.max() + 1, int)
    np.maximum.at(length, request, rows.position)
    whole = (length[request] == 8) & (rows.event <= 2)
    position, click = rows.position[whole], rows.event[whole] == 2
    rate = np.bincount(position, click)[1:] / np.bincount(position)[1:]
    np.testing.assert_allclose(rate / rate[0], log.propensities, rtol=0.08)
    np.testing.assert_allclose(log.propensities, np.arange(1, 9) ** -0.9)


def test_sorted_lists_are_in_the_order_of_popularity() -> None:
    """All of them but the shuffled ones; without sorted_share few long ones are."""
    for share, low, high in ((0.0, 0.0, 0.02), (0.6, 0.5, 0.58)):
        world = worlds(interactions=4_000, sorted_share=share)
        rows = Rows.join(list(Log(world).batches()))
        listed = rows.take(np.flatnonzero(rows.event <= 2))
        order = np.lexsort((listed.position, listed.text, listed.session))
        listed = listed.take(order)
        inner = (listed.session[1:] == listed.session[:-1]) & (listed.text[1:] == listed.text[:-1])
        falls = np.diff(world.items.popularity[listed.item]) <= 0
        number = np.concatenate([[0], np.cumsum(~inner)])
        length, wrong = np.bincount(number), np.bincount(number[1:], inner & ~falls, number[-1] + 1)
        assert low <= (wrong[length == 8] == 0).mean() <= high, share


def test_click_chance_is_how_often_seen_items_are_clicked() -> None:
    """Where users look at all positions, clicks are as frequent as click_chance says, also of popular items."""
    log = Log(worlds(interactions=30_000, position_exponent=0.0, requests_per_session=1))
    world, rows = log._world, Rows.join(list(log.batches()))
    listed = rows.take(np.flatnonzero((rows.event <= 2) & (rows.text < len(world.texts))))
    listed = listed.take(np.flatnonzero(~world.polysemous[listed.text]))
    meaning = np.array([senses[0] for senses in world.senses])[listed.text]
    chance = log.click_chance(listed.user, meaning, listed.item, draws=5, seed=1)
    clicked = listed.event == 2
    # By chance, and by popularity, which only the item that a user has in mind brings in.
    for column in (chance, world.items.popularity[listed.item]):
        tenth = np.argsort(np.argsort(column)) * 10 // len(column)
        expected, found = (np.bincount(tenth, values) / np.bincount(tenth) for values in (chance, clicked))
        np.testing.assert_allclose(found, expected, rtol=0.1, atol=0.01)


def test_labels(shop: Written) -> None:
    labels, true = shop.table("labels.parquet"), shop.table("truth/labels.parquet")
    assert len(labels["query"]) == 3_000 == len(set(zip(labels["query"], labels["item"], strict=True)))
    assert (labels["query"] == true["query"]).all() and (labels["item"] == true["item"]).all()
    assert set(labels["grade"].tolist()) == {0, 1, 2, 3}
    assert np.bincount(true["grade"]).min() > 100
    off = np.abs(labels["grade"] - true["grade"])
    assert off.max() == 1 and 0.07 < off.mean() < 0.13
    items = shop.item_rows(true["item"])
    for query, item, grade in zip(true["query"], items, true["grade"], strict=True):
        assert (item in shop.relevant[query]) == (grade == 3), (query, shop.items["title"][item], grade)
    judged = set(shop.kinds("dev")) | set(shop.kinds("test"))
    assert not judged & set(labels["query"].tolist())


# What must not give the truth away.


def test_nothing_obvious_leaks(shop: Written) -> None:
    ids, log = shop.items["item_id"], shop.log
    assert (np.diff(ids) > 1).mean() > 0.99
    clicks = np.bincount(shop.item_rows(shop.clicks["item_id"]), minlength=len(ids))
    # Four standard errors of a rank correlation of nothing.
    limit = 4 / np.sqrt(len(ids))
    category = np.unique(shop.items["category"].astype(str), return_inverse=True)[1]
    for column in (clicks, shop.items["price"], shop.items["sales"], category):
        for number in (ids, ids % 2, ids % 10):
            assert abs(rank_correlation(number, column)) < limit
    limit = 4 / np.sqrt(len(shop.users["user_id"]))
    active = np.bincount(shop.user_rows(shop.clicks["user_id"]), minlength=len(shop.users["user_id"]))
    for column in (active, shop.table("truth/users.parquet")["profile"]):
        assert abs(rank_correlation(shop.users["user_id"], column)) < limit

    # Of what was shown at a place, neither the session's number nor its time says whether it was clicked.
    first = shown(log) & (log["position"] == 1)
    click = (log["event"] == "click")[first]
    limit = 4 / np.sqrt(first.sum())
    session = log["session"][first]
    for number in (session, session % 2, session % 1000):
        assert abs(rank_correlation(number, click)) < limit
    assert abs(rank_correlation(np.arange(first.sum()), click)) < limit
    number, begin = np.unique(session, return_index=True)
    assert abs(rank_correlation(number, log["time"][first][begin])) < 4 / np.sqrt(len(number))
    query = np.unique(log["query"][first].astype(str), return_inverse=True)[1]
    assert abs(rank_correlation(log["time"][first], query)) < limit

    time = log["time"]
    assert (np.diff(time) >= 0).all() and 55 * 86_400 < time[-1] - time[0] < 60 * 86_400
    hours = np.bincount(time[first.nonzero()[0]] // 3600 % 24)
    assert hours[20] > 4 * hours[3]


def test_titles_are_no_keys_of_queries(shop: Written) -> None:
    """No title is a query, and most queries that mean something mean several items."""
    titles = {title.lower() for title in shop.items["title"]}
    assert not titles & set(shop.log["query"].tolist())
    sizes = [len(shop.relevant[query]) for query in shop.clicks["query"]]
    assert np.median(sizes) > 10


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, ties at their mean rank."""

    def ranks(x: np.ndarray) -> np.ndarray:
        _, of, count = np.unique(x, return_inverse=True, return_counts=True)
        return (np.cumsum(count) - count / 2)[of]

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


# Flags and sizes.


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--items=199"], "--items=199: expected 200 to 5,000,000"),
        (["--items=many"], "--items=many"),
        (["--users=0"], "--users=0: expected 10 to 20,000,000"),
        (["--interactions=-1"], "--interactions=-1: expected 100 to 1,000,000,000"),
        (["--seed=-1"], "--seed=-1: expected 0 to 9,223,372,036,854,775,807"),
        (["--set=taste"], "--set=taste: expected name=value"),
        (["--set=taste=strong"], "--set=taste=strong: taste is 'strong', expected a number"),
        (["--set=taste=[1"], "'[1' is not valid YAML"),
        (["--set=taste=2024-13-01"], "'2024-13-01' is not valid YAML: month must be in 1..12"),
        (["--set=noise=2"], "--set=noise=2: noise is 2.0, expected 0 to 0.5"),
        (["--set=tast=1"], "unknown key 'tast'"),
        (["--set=tast=1"], "did you mean 'taste'?"),
        (["--set=items=1"], "items is 1, expected 200 to 5000000"),
        (["--set=taste=.nan"], "taste is nan"),
        (["--parameters=nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--interactions=20000000", "--set=days=1"], "expected 2 days or more"),
        (["stray"], "unexpected argument 'stray'"),
        (["--nonsense=1"], "nonsense"),
    ],
)
def test_bad_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    assert command_line.main(["generate", f"--out={tmp_path / 'shop'}", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """No file may grow beyond 100 kB, which is what a full disk does to the log's first part."""
    script = (
        "import resource, signal, sys; from dpsr_common.command_line import main;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "generate", f"--out={tmp_path / 'shop'}"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and "cannot be written" in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_parameters_that_do_not_go_together() -> None:
    with pytest.raises(UsageError, match="expected 2 days or more"):
        g.generate(Parameters(interactions=20_000_000, days=1), Path("nowhere"))
    with pytest.raises(UsageError, match="shared_brands is 2, expected at most invented_brands, 1"):
        g.generate(Parameters(invented_brands=1, shared_brands=2), Path("nowhere"))


def test_flags_win_over_a_file_of_parameters(tmp_path: Path) -> None:
    (tmp_path / "hard.yaml").write_text("seed: 3\nitems: 250\nusers: 30\ntaste: 0.5\nnoise: 0.1\n")
    flags = [f"--parameters={tmp_path / 'hard.yaml'}", "--items=300", "--interactions=500", "--set=noise=0.2"]
    assert command_line.main(["generate", f"--out={tmp_path / 'shop'}", *flags]) == 0
    wanted = Parameters(seed=3, items=300, users=30, interactions=500, taste=0.5, noise=0.2)
    assert Written(tmp_path / "shop").truth["parameters"] == to_dict(wanted)


def test_out_is_needed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["generate"]) == 2
    assert "--out is missing" in capsys.readouterr().err
    (tmp_path / "mine").write_text("precious")
    assert command_line.main(["generate", f"--out={tmp_path}"]) == 1
    assert "exists already" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    shop = tmp_path / "shop"
    for extra in ([], ["--overwrite"]):
        assert command_line.main(["generate", f"--out={shop}", *SMALL, *extra]) == 0


@pytest.mark.parametrize("seed", [0, 3, 2**63 - 1])
def test_smallest_shop(tmp_path: Path, seed: int) -> None:
    out = tmp_path / "shop"
    flags = [f"--seed={seed}", "--items=200", "--users=10", "--interactions=100"]
    assert command_line.main(["generate", f"--out={out}", *flags]) == 0
    shop = Written(out)
    assert (len(shop.items["item_id"]), len(shop.users["user_id"]), len(shop.clicks["query"])) == (200, 10, 100)
    for fold in ("dev", "test"):
        assert set(shop.kinds(fold).values()) == {"plain", "gap", "partial", "typo", "polysemous"}
    assert len(shop.judgments("personal")) > 500 and len(shop.table("labels.parquet")["query"]) > 300


@pytest.mark.parametrize(
    "parameters",
    [
        {"list_length": 100, "stray_share": 0.9, "shuffled_share": 1, "days": 1},
        {"list_length": 2, "position_exponent": 3, "click_level": -4, "taste": 5, "history": 5},
        {"invented_brands": 200, "shops": 5_000, "chinese_share": 0.9, "held_out_share": 0.5, "misspellings": 1},
        {"popularity_exponent": 0, "query_exponent": 0, "activity_exponent": 0, "noise": 0, "cart_share": 1},
        {"popularity_exponent": 2, "query_exponent": 2, "activity_exponent": 2, "typo_share": 1, "loyalty": 1},
    ],
)
def test_far_away_parameters(tmp_path: Path, parameters: dict[str, Any]) -> None:
    counts = g.generate(Parameters(items=400, users=30, interactions=2_000, seed=5, **parameters), tmp_path)
    shop = Written(tmp_path)
    assert counts["clicks"] == len(shop.clicks["query"]) == 2_000
    assert counts["judged_dev_plain"] and counts["judged_test_gap"]
    assert not set(shop.log["query"].tolist()) & (set(shop.kinds("dev")) | set(shop.kinds("test")))


def test_documented_parameters() -> None:
    """The table in docs/generated_shop.md has every parameter, its default and its bounds."""
    rows = [line.split("|") for line in (ROOT / "docs" / "generated_shop.md").read_text().splitlines()]
    documented = {row[1].strip(" `"): (row[2].strip(), row[3].strip()) for row in rows if len(row) == 6}
    actual = {
        field.name: (f"{field.default:g}", "{minimum:,} to {maximum:,}".format(**field.metadata))
        for field in dataclasses.fields(Parameters)
    }
    assert {name: documented.get(name) for name in actual} == actual
