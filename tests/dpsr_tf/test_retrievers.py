"""Retrievers: BM25 against its definition, exact search against NumPy, fusion by hand, names of systems."""

from __future__ import annotations

import collections
import math

import numpy as np
import pytest

from dpsr_common.errors import UsageError
from dpsr_tf.data.store import RowsById
from dpsr_tf.data.user_requests import User
from dpsr_tf.evaluation.baselines import (
    Bm25,
    Bm25Options,
    Field,
    Popularity,
    Random,
    letter_trigrams,
    plain_words,
    stems,
    unigrams,
    unigrams_and_bigrams,
)
from dpsr_tf.evaluation.corpus import Corpus
from dpsr_tf.evaluation.fusion import Fusion
from dpsr_tf.evaluation.retriever import ask
from dpsr_tf.evaluation.systems import Systems, parse
from dpsr_tf.models.exact_search import ExactSearch, best_of_blocks, is_repeat, top_positions
from dpsr_tokenizer import Tokenizer, TokenizerConfig

NAN, INF = float("nan"), float("inf")


def fixed(lists, scores=None, personal=False):
    """Returns a retriever that answers query "0", "1", ... with these items, padded to k."""

    def retrieve(queries, users, k):
        retrieve.asked.append((list(queries), users, k))
        ids, found = np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), -INF, np.float32)
        for row, query in enumerate(queries):
            mine = lists[int(query)][:k]
            ids[row, : len(mine)] = mine
            found[row, : len(mine)] = scores[int(query)][: len(mine)] if scores else -np.arange(len(mine))
        return ids, found

    retrieve.asked, retrieve.personal = [], personal
    return retrieve


def answer(retriever, query="0", k=10):
    """Returns the items and scores of one query without padding."""
    ids, scores = retriever([query], None, k)
    assert ids.shape == scores.shape == (1, k) and (ids.dtype, scores.dtype) == (np.int64, np.float32)
    count = int((ids[0] >= 0).sum())
    assert (ids[0, count:] == -1).all() and (scores[0, count:] == -INF).all()
    return ids[0, :count].tolist(), scores[0, :count].tolist()


# Shared parts.


@pytest.mark.parametrize("k", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("seed", range(5))
def test_best_is_the_head_of_a_full_sort(k, seed):
    rng = np.random.default_rng(seed)
    ids, scores = rng.permutation(9), rng.integers(0, 3, 9).astype(np.float32)
    expected = sorted(range(9), key=lambda row: (-scores[row], ids[row]))[:k]
    assert top_positions(ids, scores, k).tolist() == expected


def test_best_puts_nan_last():
    ids, scores = np.arange(5), np.array([NAN, 1.0, NAN, 3.0, -INF])
    assert top_positions(ids, scores, 5).tolist() == [3, 1, 4, 0, 2]
    assert top_positions(ids, scores, 2).tolist() == [3, 1]
    assert top_positions(ids, scores, 4).tolist()[:3] == [3, 1, 4]
    assert top_positions(np.zeros(0, int), np.zeros(0), 3).tolist() == []


@pytest.mark.parametrize("k", [1, 7, 300])
@pytest.mark.parametrize("num_heads", [1, 3])
def test_items_in_blocks_are_ranked_as_all_at_once(k, num_heads):
    """With many ties, more queries than a batch has, a query that finds nothing, and blocks of all sizes."""
    random = np.random.default_rng(k)
    ids = random.permutation(1000)[:200]
    items = random.integers(-2, 3, (200, 4)).astype(np.float32)
    heads = random.integers(-2, 3, (70, num_heads, 4)).astype(np.float32)
    heads[5] = 0
    search = ExactSearch(lambda queries, users: heads[[int(query) for query in queries]], ids, items)
    expected = search([str(query) for query in range(len(heads))], None, k)
    parts = np.split(np.arange(200), [1, 1, 60, 199])
    found = best_of_blocks(heads, ((ids[part], items[part]) for part in parts), k)
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_array_equal(got, want)
    assert (found[0][5] == -1).all()


def test_is_repeat():
    ids = np.array([[1, 2, 1, 1], [-1, -1, 3, 4], [7, 8, 9, 10]])
    assert is_repeat(ids).tolist() == [[0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]


def test_item_rows():
    rows = RowsById(np.array([50, 10, 40]))
    assert rows(np.array([[10, 40], [50, 45], [-1, 99]])).tolist() == [[1, 2], [0, -1], [-1, -1]]
    assert RowsById(np.zeros(0, int))(np.array([3])).tolist() == [-1]


def test_users_reach_only_those_that_make_use_of_them():
    users = [User(5, 100), User(-1)]
    plain, personal = fixed([[1], [2]]), fixed([[1], [2]], personal=True)
    for retriever in (plain, personal):
        ask(retriever, ["0", "1"], users, 3)
    assert plain.asked == [(["0", "1"], None, 3)]
    assert personal.asked == [(["0", "1"], users, 3)]
    ask(Fusion([plain, personal]), ["0", "1"], users, 3)
    assert plain.asked[-1] == (["0", "1"], None, 1000) and personal.asked[-1] == (["0", "1"], users, 1000)


def test_an_answer_of_another_shape_is_an_error():
    with pytest.raises(ValueError, match=r"ids \[1, 2\] and scores \[1, 3\], expected both \[1, 3\]"):
        ask(lambda queries, users, k: (np.zeros((1, 2)), np.zeros((1, 3))), ["a"], None, 3)


# BM25.

TITLES = [
    "red running shoes",
    "Red shoes, red laces",
    "blue running shorts",
    "红色 跑鞋",
    "红色 手机壳 iPhone 红色",
    "running running running shoes shoes",
    "",
    "3/4 in. hex bolt 3/4",
    "shoes",
]
IDS = [50, 10, 40, 20, 90, 30, 60, 80, 70]


def bm25(query, titles=TITLES, ids=IDS, k1=1.2, b=0.75):
    """Returns (item, score) for scores above 0, best first, by Lucene's idf and term weight."""
    tokenizer = Tokenizer(TokenizerConfig(letter_trigrams=False))
    documents = [tokenizer.tokenize(title) for title in titles]
    mean = sum(map(len, documents)) / len(documents)
    scored = []
    for item, document in zip(ids, documents, strict=True):
        score = 0.0
        for term in tokenizer.tokenize(query):
            holding = sum(term in other for other in documents)
            idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
            frequency = document.count(term)
            score += idf * frequency / (frequency + k1 * (1 - b + b * len(document) / mean))
        if score > 0:
            scored.append((-score, item))
    return [(item, -score) for score, item in sorted(scored)]


def of_texts(ids, texts, tokenize=None, **constants):
    """BM25 over one text of each item."""
    return Bm25(np.array(ids), [Field(texts, tokenize or unigrams())], **constants)


QUERIES = [
    "red",
    "RED SHOES",
    "running shoes",
    "running running shoes",
    "红色",
    "红色 跑鞋",
    "跑",
    "iphone 手机",
    "bolt 3/4",
    "shoes unheard",
]


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize(("k1", "b"), [(1.2, 0.75), (0.9, 0.4)])
def test_bm25_equals_its_definition(query, k1, b):
    ids, scores = of_texts(IDS, TITLES, k1=k1, b=b)([query], None, 9)
    expected = bm25(query, k1=k1, b=b)
    assert 0 < len(expected) < 9
    assert ids[0, : len(expected)].tolist() == [item for item, _ in expected]
    np.testing.assert_allclose(scores[0, : len(expected)], [score for _, score in expected], rtol=1e-5)
    assert (ids[0, len(expected) :] == -1).all() and (scores[0, len(expected) :] == -np.inf).all()


def test_bm25_shapes_types_and_batches():
    retriever = of_texts(IDS, TITLES)
    for k in (1, 3, 9, 50):
        ids, scores = retriever(QUERIES, None, k)
        assert ids.shape == scores.shape == (len(QUERIES), k)
        assert (ids.dtype, scores.dtype) == (np.int64, np.float32)
        for query, row, row_scores in zip(QUERIES, ids.tolist(), scores, strict=True):
            expected = bm25(query, k1=1.2, b=0.75)[:k]
            assert row == [item for item, _ in expected] + [-1] * (k - len(expected))
            np.testing.assert_allclose(row_scores[: len(expected)], [score for _, score in expected], rtol=1e-5)
    assert retriever([], None, 3)[0].shape == (0, 3)


@pytest.mark.parametrize("query", ["", "   ", "unheard", "!!!", "鞋子"])
def test_bm25_finds_nothing(query):
    ids, scores = of_texts(IDS, [title for title in TITLES if "鞋" not in title] + ["x"] * 1)([query], None, 4)
    assert (ids == -1).all() and (scores == -np.inf).all()


@pytest.mark.parametrize("k", [1, 3, 5, 20, 40])
def test_bm25_breaks_ties_by_id_also_where_k_cuts(k):
    ids = np.random.default_rng(0).permutation(40)
    found, _ = of_texts(ids, ["red shoes"] * 40)(["red"], None, k)
    assert found[0].tolist() == list(range(k))


def test_bm25_of_titles_without_words():
    ids, _ = of_texts([1, 2], ["", "!!!"])(["red"], None, 2)
    assert (ids == -1).all()


@pytest.mark.parametrize("tokenize", [None, unigrams_and_bigrams(), plain_words()])
def test_bm25_scores_pairs_as_it_ranks_them(tokenize):
    retriever = of_texts(IDS, TITLES, tokenize=tokenize)
    many = QUERIES * 15  # more than one batch
    ids, scores = retriever(many, None, 9)
    items = np.tile(sorted(IDS), (len(many), 1))
    found = retriever.score(many, None, items)
    assert found.dtype == np.float32
    for row in range(len(many)):
        of_item = dict(zip(sorted(IDS), found[row].tolist(), strict=True))
        count = int((ids[row] >= 0).sum())
        assert [of_item.pop(item) for item in ids[row, :count].tolist()] == scores[row, :count].tolist()
        assert not any(of_item.values()), "what is not retrieved has the score 0"
    assert retriever.score(["red"], None, np.array([[-1, 99, 50]])).tolist()[0][:2] == [0, 0]


def test_bm25_tokenizers():
    words = of_texts([1, 2, 3], ["Café 10-in. ABC", "caf abc", "红鞋"], tokenize=plain_words())
    assert sorted(answer(words, "CAF")[0]) == [1, 2], "é is no letter of a to z"
    assert answer(words, "红鞋")[0] == []
    pairs = of_texts([1, 2], ["red dress blue shoes", "red shoes blue dress"], tokenize=unigrams_and_bigrams())
    assert answer(pairs, "red shoes")[0] == [2, 1]
    assert answer(of_texts([1, 2], ["red dress blue shoes", "red shoes blue dress"]), "red shoes")[0] == [1, 2]


def test_bm25_sums_the_weighted_scores_of_its_fields():
    brands = ["Acme", "Red", "", "Acme", "Red", "", "", "bolt", ""]
    both = Bm25(np.array(IDS), [Field(TITLES, weight=2.0), Field(brands, weight=0.5)])
    for query in ("red shoes", "acme", "bolt", "红色"):
        expected = collections.Counter()
        for texts, weight in ((TITLES, 2.0), (brands, 0.5)):
            for item, score in bm25(query, texts):
                expected[item] += weight * score
        found = dict(zip(*answer(both, query), strict=True))
        assert found == pytest.approx(dict(expected), rel=1e-5) and len(found) > 0
        ids, scores = answer(both, query)
        assert scores == sorted(scores, reverse=True)
        assert both.score([query], None, np.array([ids]))[0].tolist() == scores
    only = Bm25(np.array(IDS), [Field([""] * 9), Field(brands)])
    assert answer(only, "acme")[0] == [20, 50], "a field without words is left out"


def test_bm25_finds_other_forms_of_a_word_by_its_stem():
    titles = ["wall shelves", "shelf, walled", "手机壳"]
    assert stems()("Shelves RUNNING 手机壳") == ["shelv", "run", *unigrams()("手机壳")]
    assert answer(of_texts([1, 2, 3], titles), "walls")[0] == []
    assert answer(of_texts([1, 2, 3], titles, stems()), "walls")[0] == [1, 2]
    assert answer(of_texts([1, 2, 3], titles, stems()), "手机")[0] == [3]


def test_bm25_finds_misspelt_words_by_their_letter_trigrams():
    titles = ["refrigerator", "microwave oven", "手机壳"]
    assert letter_trigrams()("oven 手机") == ["##ov", "#ove", "#ven", "#en#"]
    assert answer(of_texts([1, 2, 3], titles), "refridgerator")[0] == []
    assert answer(of_texts([1, 2, 3], titles, letter_trigrams()), "refridgerator")[0] == [1]


# Baselines without text.


def test_popularity():
    retriever = Popularity(np.array([30, 10, 20, 40]), np.array([1, 5, 5, 0]))
    assert answer(retriever, "anything") == ([10, 20, 30, 40], [5, 5, 1, 0])
    assert answer(retriever, k=1)[0] == [10]
    assert retriever.score(["a", "b"], None, np.array([[40, 30], [10, -1]]))[:, 0].tolist() == [0, 5]


def test_random_is_uniform_distinct_and_the_same_for_the_same_query():
    item_ids = np.arange(100) * 7
    retriever = Random(item_ids, seed=3)
    queries = [str(i) for i in range(2000)]
    ids, _ = retriever(queries, None, 10)
    assert not is_repeat(ids).any() and np.isin(ids, item_ids).all()
    counts = np.bincount(ids.ravel() // 7, minlength=100)  # 200 each, standard deviation 13.4
    assert np.abs(counts - 200).max() < 6 * 13.4
    assert (retriever(queries[5:7], None, 10)[0] == ids[5:7]).all(), "whatever else is asked"
    assert (Random(item_ids, seed=4)(queries, None, 10)[0] != ids).any()
    assert len(answer(retriever, k=200)[0]) == 100
    assert not retriever.score(["a"], None, ids[:1]).any()


# Exact search.


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("k", [1, 10, 200])
def test_exact_search_equals_numpy(heads, k):
    rng = np.random.default_rng(heads)
    # Small whole numbers: sums are exact, and many scores tie.
    items = rng.integers(-2, 3, (100, 4)).astype(np.float32)
    item_ids = rng.permutation(1000)[:100]
    embeddings = rng.integers(-2, 3, (150, heads, 4)).astype(np.float32)
    embeddings[7] = 0
    asked = []

    def encode(queries, users):
        asked.append((len(queries), users))
        return embeddings[[int(query) for query in queries]]

    retriever = ExactSearch(encode, item_ids, items)
    queries = [str(i) for i in range(150)]
    ids, scores = retriever(queries, None, k)
    products = np.einsum("nhd,id->nhi", embeddings, items).max(axis=1)
    for row in range(150):
        order = [] if row == 7 else sorted(range(100), key=lambda i: (-products[row, i], item_ids[i]))[:k]
        assert ids[row, : len(order)].tolist() == item_ids[order].tolist()
        assert scores[row, : len(order)].tolist() == products[row, order].tolist()
        assert (ids[row, len(order) :] == -1).all()
    pairs = np.stack([rng.permutation(item_ids)[:5] for _ in range(150)])
    rows = RowsById(item_ids)(pairs)
    np.testing.assert_array_equal(retriever.score(queries, None, pairs), np.take_along_axis(products, rows, axis=1))
    assert max(count for count, _ in asked) < 150, "in batches"


def test_exact_search_gives_each_batch_its_users():
    seen = []

    def encode(queries, users):
        seen.extend(users)
        return np.ones((len(queries), 1, 2), np.float32)

    users = [User(i) for i in range(100)]
    retriever = ExactSearch(encode, np.arange(3), np.ones((3, 2), np.float32), personal=True)
    ask(retriever, ["q"] * 100, users, 2)
    assert seen == users


# Fusion.


def test_reciprocal_rank_fusion_by_hand():
    fusion = Fusion([fixed([[1, 2, 3]]), fixed([[3, 4]])])
    ids, scores = answer(fusion)
    assert ids == [3, 1, 2, 4]
    assert scores == pytest.approx([1 / 63 + 1 / 61, 1 / 61, 1 / 62, 1 / 62]), "2 and 4 tie: by id"


def test_weighted_fusion_by_hand():
    fusion = Fusion([fixed([[1, 2, 3]], [[30, 20, 10]]), fixed([[3, 4]], [[0.9, 0.5]])], [0.7, 0.3])
    ids, scores = answer(fusion)
    assert ids == [1, 2, 3, 4]
    assert scores == pytest.approx([0.7, 0.35, 0.3, 0.0])


@pytest.mark.parametrize("weights", [None, [0.5, 0.5]])
def test_fusion_of_empty_single_and_odd_answers(weights):
    def fuse(*lists, scores=None):
        return answer(Fusion([fixed([one], scores and [scores]) for one in lists], weights))

    assert fuse([], []) == ([], [])
    assert fuse([5], [])[0] == [5]
    assert fuse([1, 1, 2], [])[0] == [1, 2]
    assert fuse([1, 1, 2], [])[1][0] < fuse([1, 2], [1])[1][0], "a repeat adds nothing"
    assert fuse([-1, 2], [])[0] == [2]
    assert fuse([1, 2], [1], scores=[NAN, 1.0])[0] == [2], "an item whose score is NaN is not found"
    assert fuse([1, 2], [], scores=[INF, 1.0])[0] == [1, 2]
    assert fuse([1, 2], [], scores=[4.0, 4.0])[0] == [1, 2]


def test_fusion_asks_as_deep_for_any_k():
    lists = [list(range(0, 100)), list(range(99, 49, -1))]
    deep = Fusion([fixed([one]) for one in lists])
    assert answer(deep, k=100)[0][:5] == answer(deep, k=5)[0]
    shallow = [fixed([one]) for one in lists]
    answer(Fusion(shallow, depth=10), k=20)
    assert [part.asked[0][2] for part in shallow] == [20, 20]


# Names.

CORPUS = Corpus(np.array(IDS), TITLES, np.arange(len(IDS), dtype=np.float32))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("bm25", ("bm25", [], None)),
        ("bm25-bigrams", ("bm25-bigrams", [], None)),
        ("bm25:stem+k1=0.9", ("bm25", ["stem+k1=0.9"], None)),
        ("weighted(bm25:stem+b=.4:0.3,random:1)", ("weighted", ["bm25:stem+b=.4", "random"], [0.3, 1])),
        ("model:a/b:c", ("model", ["a/b:c"], None)),
        ("index:x", ("index", ["x"], None)),
        ("servable:/x/1", ("servable", ["/x/1"], None)),
        ("server:localhost:8500/demo", ("server", ["localhost:8500", "demo"], None)),
        ("rrf(bm25,random)", ("rrf", ["bm25", "random"], None)),
        (" rrf( bm25 , model:m ) ", ("rrf", ["bm25", "model:m"], None)),
        ("weighted(model:m:0.7,bm25:.3)", ("weighted", ["model:m", "bm25"], [0.7, 0.3])),
        ("weighted(server:h:1/m:2,bm25:1)", ("weighted", ["server:h:1/m", "bm25"], [2, 1])),
        (
            "rrf(bm25,rrf(random,popularity),bm25-words)",
            ("rrf", ["bm25", "rrf(random,popularity)", "bm25-words"], None),
        ),
        ("weighted(rrf(bm25,random):2,bm25:1)", ("weighted", ["rrf(bm25,random)", "bm25"], [2, 1])),
    ],
)
def test_parse(spec, expected):
    assert parse(spec) == expected


@pytest.mark.parametrize(
    ("spec", "fragment"),
    [
        ("bm26", "--system=bm26: expected one of bm25, bm25-bigrams, bm25-words, bm25:OPTIONS, popularity, random,"),
        ("", "--system=: expected one of"),
        ("model", "expected one of"),
        ("model:", "expected one of"),
        ("bm25:", "expected one of"),
        ("bm25-words:stem", "expected one of"),
        ("bm25:x", "--system=bm25:x: has the option 'x', expected stem, trigrams=WEIGHT, k1=NUMBER, b=NUMBER (0 to 1)"),
        ("bm25:stem+", "has the option '', expected"),
        ("bm25:stem=1+k1=-1", "has the option 'k1=-1', expected"),
        ("bm25:b=1.5", "has the option 'b=1.5', expected"),
        ("bm25:k1=nan", "has the option 'k1=nan', expected"),
        ("bm25:=2", "has the option '=2', expected"),
        ("rrf(bm25,bm25:x)", "--system=rrf(bm25,bm25:x): has the option 'x'"),
        ("server:localhost:1", "server:HOST:PORT/MODEL"),
        ("server:/model", "expected one of"),
        ("server:localhost:1/", "expected one of"),
        ("rrf(bm25,bm26)", "--system=rrf(bm25,bm26): has 'bm26', expected one of"),
        ("rrf(bm25,rrf(bm25,x))", "has 'x', expected one of"),
        ("rrf(bm25)", "fuses 1 system, expected at least two"),
        ("rrf()", "fuses 1 system"),
        ("rrf(bm25,)", "has ''"),
        ("rrf(bm25", "expected one of"),
        ("weighted(bm25,random)", "expected a weight above 0 with each system"),
        ("weighted(bm25:1,random:-1)", "expected a weight above 0"),
        ("weighted(bm25:1,random:0)", "expected a weight above 0"),
        ("weighted(bm25:1,random:nan)", "expected a weight above 0"),
    ],
)
def test_parse_rejects_other_names(spec, fragment):
    with pytest.raises(UsageError) as caught:
        parse(spec)
    assert fragment in str(caught.value)


def test_systems_are_made_by_name_and_shared():
    systems = Systems(CORPUS, seed=5)
    assert isinstance(systems.make("bm25"), Bm25)
    assert systems.make("bm25") is systems.make("bm25")
    assert answer(systems.make("popularity"), k=1)[0] == [IDS[-1]]
    assert answer(systems.make("random"))[0] == answer(Random(np.array(IDS), 5))[0]
    bigrams = of_texts(IDS, TITLES, tokenize=unigrams_and_bigrams())
    assert answer(systems.make("bm25-bigrams"), "red shoes") == answer(bigrams, "red shoes")
    fused = Fusion([systems.make("bm25"), systems.make("popularity")], [2, 1])
    assert answer(systems.make("weighted(bm25:2,popularity:1)"), "red") == answer(fused, "red")
    with pytest.raises(UsageError, match="model:x: needs a store"):
        systems.make("model:x")


def test_bm25_options():
    """Of the options of a name, each changes the answer as the class does."""
    systems, ids = Systems(CORPUS), np.array(IDS)
    expected = {
        "bm25": Bm25(ids, [Field(TITLES)]),
        "bm25:k1=0.9+b=0.4": Bm25(ids, [Field(TITLES)], 0.9, 0.4),
        "bm25:stem": Bm25(ids, [Field(TITLES, stems())]),
        "bm25:stem+trigrams=0.3": Bm25(ids, [Field(TITLES, stems()), Field(TITLES, letter_trigrams(), 0.3)]),
        "bm25:title=2+trigrams=1": Bm25(ids, [Field(TITLES, weight=2), Field(TITLES, letter_trigrams())]),
    }
    answers = [answer(systems.make(spec), "running red shoe") for spec in expected]
    assert answers == [answer(retriever, "running red shoe") for retriever in expected.values()]
    assert len({str(one) for one in answers}) == len(expected), "every option matters for this query"
    with pytest.raises(
        UsageError, match="--system=bm25:brand=1: has the column 'brand', expected a text column: title"
    ):
        systems.make("bm25:brand=1")


def test_bm25_reads_the_columns_that_it_is_told():
    texts = {"title": ["red shoes", "blue shoes"], "brand": ["Acme", "Red"]}

    def found(options, query):
        chosen = Bm25Options.parse(options, "") if options else Bm25Options()
        return answer(Bm25(np.array([1, 2]), chosen.fields(texts, ""), chosen.k1, chosen.b), query)[0]

    assert found("", "acme") == [1] and found("", "red") == [1, 2], "joined, and so of the same length: ties by id"
    assert found("title=1", "acme") == [], "a column that is not named is not read"
    assert found("title=1+brand=3", "red") == [2, 1] and found("title=3+brand=1", "red") == [1, 2]
    assert found("title=1+trigrams=1", "acme") == [], "nor by its trigrams"
    assert found("title=1+brand=0", "red") == [1] and found("brand=0", "red") == [], "of weight 0 it finds nothing"


@pytest.mark.long
def test_bm25_words_on_the_home_depot_folds(homedepot):
    """The published figures of textbook BM25 on these files, by its words."""
    from dpsr_tf.evaluation.judgments import Judgments
    from dpsr_tf.evaluation.measure import evaluate

    rows = [line.split("\t") for line in (homedepot / "products.tsv").read_text().split("\n")[1:] if line]
    corpus = Corpus(np.array([int(row[0]) for row in rows]), [row[1] for row in rows], np.ones(len(rows)))
    retriever = Systems(corpus).make("bm25-words")

    def figures(fold, correct=False):
        path = homedepot / f"judgments.{fold}.tsv"
        judgments = Judgments.read(path, "search_term", "product_uid", "relevance", 2.33)
        judgments.check_items(corpus.item_ids)
        if correct:
            judgments = judgments.with_queries(homedepot / f"spelling.{fold}.tsv", "query", "corrected", [])
        found = evaluate(retriever, judgments, (10, 100, 1000))
        return [len(judgments.queries), *(found[n] for n in ("recall@10", "recall@100", "recall@1000", "mrr@10"))]

    assert figures("dev") == pytest.approx([1156, 0.384, 0.682, 0.837, 0.396], abs=0.005)
    assert figures("misspelt_dev") == pytest.approx([500, 0.251, 0.542, 0.745, 0.240], abs=0.005)
    assert figures("misspelt_dev", correct=True) == pytest.approx([500, 0.351, 0.667, 0.860, 0.320], abs=0.005)
