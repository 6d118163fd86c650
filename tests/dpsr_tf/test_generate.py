"""The generated shop: what it promises, checked on its files; what only the makers know, on the world itself."""

from __future__ import annotations

import collections
import csv
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpsr_tf import cli
from dpsr_tf.data import generate as g
from dpsr_tf.data.ingest import ingest
from dpsr_tf.data.schema import load_schema
from dpsr_tf.evaluation.evaluate import Judgments, evaluate
from dpsr_tf.evaluation.retriever import Bm25
from dpsr_tokenizer import Tokenizer, TokenizerConfig

FILES = ["interactions.parquet", "items.parquet", "judgments.dev.tsv", "schema.yaml", "truth.json", "users.parquet"]


class Written:
    """The files of a shop, read as anybody would."""

    def __init__(self, path: Path):
        self.path = path
        self.items = pq.read_table(path / "items.parquet")
        self.users = pq.read_table(path / "users.parquet")
        self.log = pq.read_table(path / "interactions.parquet")
        self.truth = json.loads((path / "truth.json").read_text())
        with open(path / "judgments.dev.tsv", newline="") as file:
            self.judgments = list(csv.DictReader(file, delimiter="\t"))
        self.kinds = {row["query"]: row["kind"] for row in self.judgments}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Written:
    out = tmp_path_factory.mktemp("generate") / "shop"
    assert cli.main(["generate", f"--out={out}"]) == 0
    return Written(out)


@pytest.fixture(scope="module")
def world() -> list[g.Shop]:
    return worlds(g.Parameters())


def worlds(parameters: g.Parameters) -> list[g.Shop]:
    lexicon = g.load_lexicon()
    english = 1 - parameters.chinese_share
    return [
        g.Shop("en", lexicon.en, parameters, (0, english)),
        g.Shop("zh", lexicon.zh, parameters, (english, 1)),
    ]


def test_tables(shop: Written) -> None:
    assert sorted(p.name for p in shop.path.iterdir()) == FILES
    assert shop.items.schema.names == ["item_id", "title", "brand", "category", "price"]
    assert shop.users.schema.names == ["user_id", "gender", "age", "power"]
    assert shop.log.schema.names == ["query", "item_id", "user_id", "time"]
    assert shop.items.schema.field("item_id").type == shop.log.schema.field("time").type == pa.int64()
    counts = shop.truth["counts"]
    assert (len(shop.items), len(shop.users), len(shop.log)) == (3_000, 500, 30_000)
    assert (counts["items"], counts["users"], counts["interactions"]) == (3_000, 500, 30_000)
    assert counts["queries"] == len(set(shop.log["query"].to_pylist()))
    for table, name in ((shop.items, "item_id"), (shop.users, "user_id")):
        ids = table[name].to_numpy()
        assert len(np.unique(ids)) == len(ids)
        assert np.isin(shop.log[name].to_numpy(), ids).all()
    chinese = np.mean([any("\u4e00" <= c <= "\u9fff" for c in title) for title in shop.items["title"].to_pylist()])
    assert chinese == pytest.approx(1 / 3, abs=0.001)
    assert (shop.items["price"].to_numpy() > 0).all()


def test_same_flags_same_bytes(tmp_path: Path) -> None:
    flags = ["--items=300", "--users=20", "--interactions=1000"]
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        assert cli.main(["generate", f"--out={tmp_path / name}", f"--seed={seed}", *flags]) == 0
    for name in FILES:
        first, second, other = ((tmp_path / shop / name).read_bytes() for shop in "abc")
        assert first == second, name
        assert (first == other) == (name == "schema.yaml"), name


def test_judged_queries_are_not_in_the_log(shop: Written) -> None:
    assert not set(shop.kinds) & set(shop.log["query"].to_pylist())
    count = collections.Counter(shop.kinds.values())
    assert dict(count) == {kind: shop.truth["counts"][f"judged_{kind}"] for kind in ("plain", "gap", "typo")}
    assert min(count.values()) >= 50


def test_no_other_phrasing_of_a_judged_query_is_in_the_log(shop: Written) -> None:
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
    logged = {meaning(query) for query in shop.log["query"].to_pylist()}
    judged = {meaning(query) for query, kind in shop.kinds.items() if kind != "typo"}
    assert len(judged) > 100 and not judged & logged


def test_judged_items(shop: Written) -> None:
    ids = set(shop.items["item_id"].to_pylist())
    pairs = [(row["query"], int(row["item"])) for row in shop.judgments]
    assert len(set(pairs)) == len(pairs)
    assert {item for _, item in pairs} <= ids
    assert {row["grade"] for row in shop.judgments} == {"1"}
    assert max(collections.Counter(query for query, _ in pairs).values()) <= 50


def test_long_lists_of_relevant_items_are_sampled(tmp_path: Path) -> None:
    parameters = g.Parameters(items=2_000, interactions=1_000, max_judged_items=3)
    g.generate(parameters, tmp_path)
    shop = Written(tmp_path)
    count = collections.Counter(row["query"] for row in shop.judgments)
    assert max(count.values()) == 3
    truth = {query.text: len(query.rows) for shop_ in worlds(parameters) for query in shop_.queries}
    for query, kind in shop.kinds.items():
        if kind != "typo":
            assert count[query] == min(3, truth[query])


def test_plain_queries_mean_what_their_words_say(shop: Written) -> None:
    """Black-box: brand column and title of a judged item hold every word of a plain English query."""
    words = {
        i: set(f"{title} {brand}".lower().split())
        for i, title, brand in zip(
            *(shop.items[name].to_pylist() for name in ("item_id", "title", "brand")), strict=True
        )
    }
    checked = 0
    for row in shop.judgments:
        if row["kind"] == "plain" and row["query"].isascii():
            assert set(row["query"].split()) <= words[int(row["item"])], row
            checked += 1
    assert checked > 200


def test_synonyms_stand_in_no_title(shop: Written) -> None:
    """No word of an English synonym, and no two neighbouring characters of a Chinese one, is in any title."""
    tokenizer = Tokenizer(TokenizerConfig(letter_trigrams=False, char_unigrams=False))
    in_titles = {token for title in shop.items["title"].to_pylist() for token in tokenizer.tokenize(title)}
    in_log = "\n".join(sorted(set(shop.log["query"].to_pylist())))
    phrases = [phrase for words in shop.truth["synonyms"].values() for entries in words.values() for phrase in entries]
    assert len(phrases) > 60
    for phrase in phrases:
        tokens = set(tokenizer.tokenize(phrase))
        assert tokens and not tokens & in_titles, (phrase, tokens & in_titles)
        assert phrase in in_log, "a synonym that nobody uses cannot be learnt"


def test_gap_queries_hold_a_synonym(shop: Written) -> None:
    phrases = [p for words in shop.truth["synonyms"].values() for entries in words.values() for p in entries]
    for query, kind in shop.kinds.items():
        if kind != "typo":
            assert any(phrase in query for phrase in phrases) == (kind == "gap"), query


def test_clicks_are_relevant_but_for_the_noise(world: list[g.Shop]) -> None:
    for shop in world:
        relevant = {query.text: set(query.rows.tolist()) for query in shop.queries}
        log = shop.clicks()
        known = np.array([text in relevant for text in log.queries])
        assert 1 - known.mean() == pytest.approx(0.04, abs=0.015)  # misspelt
        right = np.array([i in relevant.get(text, ()) for text, i in zip(log.queries, log.item.tolist(), strict=True)])
        assert right[known & ~log.noise].all()
        assert log.noise.mean() == pytest.approx(0.05, abs=0.01)
        assert right[known & log.noise].mean() < 0.2


def test_noise_and_typos_can_be_turned_off() -> None:
    for shop in worlds(g.Parameters(interactions=3_000, noise_share=0, typo_share=0)):
        relevant = {query.text: set(query.rows.tolist()) for query in shop.queries}
        log = shop.clicks()
        assert all(item in relevant[text] for text, item in zip(log.queries, log.item.tolist(), strict=True))


def test_polysemous_words_mean_brand_and_product(world: list[g.Shop]) -> None:
    for shop, text in ((world[0], "apple"), (world[1], "苹果")):
        assert text in shop.polysemous()
        (query,) = [query for query in shop.queries if query.text == text]
        brands = {shop.brand_name(row) == text for row in query.rows}
        words = {shop.types[shop.item_type[row]].word for row in query.rows}
        assert brands == {True, False} and text in words and len(words) > 2
        assert not query.held_out


def test_accessories_name_another_product(shop: Written, world: list[g.Shop]) -> None:
    cases = [title for title in shop.items["title"].to_pylist() if "Cell Phone Case" in title]
    assert len(cases) > 20
    for title in cases:
        host = title.partition(" Fits ")[2].split()
        assert host[1:3] == ["Cell", "Phone"], title
    (query,) = [query for query in world[0].queries if query.text == "cell phone"]
    assert not any("Case" in world[0].titles[row] for row in query.rows)
    assert shop.truth["misleading"]["en"]["cell phone case"] == "cell phone"


def test_profile_changes_what_is_clicked(world: list[g.Shop]) -> None:
    shop = world[0]
    log = shop.clicks()
    gender = np.array([shop.profile(user)[0] for user in log.user])
    power = np.array([shop.profile(user)[2] for user in log.user])
    for who, other, word in (("female", "male", "pink"), ("male", "female", "navy")):
        clicked = np.array([word in shop.titles[item].lower().split() for item in log.item])
        assert clicked[gender == who].mean() > 1.5 * clicked[gender == other].mean()
    price = np.array([shop.price[item] / shop.types[shop.item_type[item]].price for item in log.item])
    assert np.median(price[power == "high"]) > 1.5 * np.median(price[power == "low"])


def test_profile_counts_for_nothing_without_taste() -> None:
    shop = worlds(g.Parameters(taste=0))[0]
    np.testing.assert_allclose(shop.pull, np.broadcast_to(shop.popularity, shop.pull.shape))


def test_nothing_obvious_leaks(shop: Written, world: list[g.Shop]) -> None:
    ids = shop.items["item_id"].to_numpy()
    assert (np.diff(ids) > 1).sum() > 0.99 * len(ids)
    clicks = collections.Counter(shop.log["item_id"].to_pylist())
    popularity = np.array([clicks[i] for i in ids.tolist()])
    # Four standard errors of a rank correlation of nothing.
    limit = 4 / np.sqrt(len(ids))
    assert abs(rank_correlation(ids, popularity)) < limit
    assert abs(rank_correlation(ids, shop.items["price"].to_numpy())) < limit
    category = np.unique(np.array(shop.items["category"].to_pylist()), return_inverse=True)[1]
    assert abs(rank_correlation(ids, category)) < limit
    time = shop.log["time"].to_numpy()
    assert (np.diff(time) >= 0).all()
    assert time[-1] - time[0] < 60 * 86_400
    item, user = shop.log["item_id"].to_numpy(), shop.log["user_id"].to_numpy()
    query = np.unique(np.array(shop.log["query"].to_pylist()), return_inverse=True)[1]
    limit = 4 / np.sqrt(len(time))
    for column in (item, user, query):
        assert abs(rank_correlation(np.arange(len(time)), column)) < limit
        assert abs(np.corrcoef(column[1:], column[:-1])[0, 1]) < limit
    for half in world:
        assert abs(rank_correlation(np.arange(len(half.titles)), half.popularity)) < 4 / np.sqrt(len(half.titles))


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, ties in the order of their places shuffled by a fixed seed."""
    shuffle = np.random.default_rng(0).permutation(len(a))
    ranks = [np.argsort(np.argsort(x[shuffle], kind="stable")) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def test_ingests_and_bm25_fails_where_it_should(shop: Written, tmp_path: Path) -> None:
    schema = load_schema(shop.path / "schema.yaml")
    assert schema.users is not None and schema.users.features == ("gender", "age", "power")
    counts = ingest(schema, shop.path, tmp_path, max_reject_fraction=0)
    assert (counts.items, counts.users, counts.positives) == (3_000, 501, 30_000)
    bm25 = Bm25(shop.items["item_id"].to_numpy(), shop.items["title"].to_pylist())
    recall = {}
    for kind in ("plain", "gap", "typo"):
        path = tmp_path / f"{kind}.tsv"
        rows = [f"{row['query']}\t{row['item']}\t1" for row in shop.judgments if row["kind"] == kind]
        path.write_text("\n".join(["query\titem\tgrade", *rows]) + "\n")
        recall[kind] = evaluate(bm25, Judgments.read(path, "query", "item", "grade", 1))["recall@10"]
    assert recall["plain"] > 0.8
    assert recall["gap"] < recall["plain"] - 0.2
    assert recall["typo"] < recall["plain"] - 0.1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--items=199"], "--items=199: expected 200 to 1,000,000"),
        (["--items=many"], "--items=many"),
        (["--users=0"], "--users=0: expected 10 to 10,000,000"),
        (["--interactions=-1"], "--interactions=-1: expected 100 to 20,000,000"),
        (["--seed=-1"], "--seed=-1: expected 0 to 9,223,372,036,854,775,807"),
        (["stray"], "unexpected argument 'stray'"),
        (["--nonsense=1"], "nonsense"),
    ],
)
def test_bad_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    assert cli.main(["generate", f"--out={tmp_path / 'shop'}", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_out_is_needed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate"]) == 2
    assert "--out is missing" in capsys.readouterr().err
    (tmp_path / "mine").write_text("precious")
    assert cli.main(["generate", f"--out={tmp_path}"]) == 1
    assert "exists already" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("seed", [0, 3, 2**63 - 1])
def test_smallest_shop(tmp_path: Path, seed: int) -> None:
    out = tmp_path / "shop"
    flags = [f"--seed={seed}", "--items=200", "--users=10", "--interactions=100"]
    assert cli.main(["generate", f"--out={out}", *flags]) == 0
    shop = Written(out)
    assert (len(shop.items), len(shop.users), len(shop.log)) == (200, 10, 100)
    assert set(shop.kinds.values()) == {"plain", "gap", "typo"}
