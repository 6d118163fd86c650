"""The trainings that check claims of section 4, and the figures of queries with several meanings."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pyarrow.parquet
import pytest
import tensorflow as tf

from dpsr_tf.config import ModelConfig
from dpsr_tf.data.examples_dataset import Batch, Tokens
from dpsr_tf.models.embedding import EmbeddingTable
from dpsr_tf.models.text_encoder import EncoderInput
from dpsr_tf.report import claims, experiments, sections, transformer
from dpsr_tf.report.polysemy import PolysemousQueries
from dpsr_tf.report.runner import ExperimentRunner
from dpsr_tf.report.shop import QUICK, Shop

v1 = tf.compat.v1

SIZE = dataclasses.replace(
    QUICK, items=1500, users=30, interactions=1500, purchases=30, judged_queries=30, shared_brands=1, steps=8,
    batch_size=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(ExperimentRunner(tmp_path_factory.mktemp("report"), 3, 1), SIZE, 0)


def batch(mask: np.ndarray) -> Batch:
    """A batch of which only the number of pairs and the mask count."""
    parts = dict.fromkeys(Batch._fields)
    return Batch(**parts | {"query_rows": tf.zeros([len(mask)], tf.int32), "negative_mask": tf.constant(mask)})  # type: ignore[arg-type]


def test_random_negatives_are_dealt_out_to_the_pairs() -> None:
    pairs, count = 3, 4
    mask = np.random.default_rng(1).random((pairs, pairs + pairs * count)) < 0.5
    dealt = claims.with_own_negatives(batch(mask), count)
    np.testing.assert_array_equal(dealt.negative_mask, mask[:, :pairs])
    # The items stay where they are, so own negative j of pair i is item b + i * count + j.
    expected = [[mask[pair, pairs + pair * count + place] for place in range(count)] for pair in range(pairs)]
    np.testing.assert_array_equal(dealt.own_negative_mask, expected)


def test_without_a_mask_only_the_own_positive_is_no_negative() -> None:
    found = claims.without_mask(batch(np.zeros((2, 4), bool))).negative_mask
    np.testing.assert_array_equal(found, [[False, True, True, True], [True, False, True, True]])


def test_embedding_sets_start_as_projections_of_the_shared_set() -> None:
    config, num_tokens = ModelConfig(num_heads=2, token_dim=8, embedding_dim=8, hidden=()), 50
    with tf.Graph().as_default():
        v1.set_random_seed(1)
        towers = claims.EmbeddingSets(config, num_tokens, table=EmbeddingTable)
        tokens = Tokens(tf.constant([1, 2, 3], tf.int32), tf.constant([0, 2, 3], tf.int64))
        query, _ = towers.query_embedding(tokens), towers.item_embedding(tokens)
        start = towers.start()
        with v1.Session() as session:
            session.run(v1.global_variables_initializer())
            session.run(start)
            shared = session.run(towers.tables["token_embedding"].variables[0])
            sets = [session.run(towers.tables[f"query_token_embedding_{head}"].variables[0]) for head in (0, 1)]
            vectors = session.run(query)
    assert vectors.shape == (2, 2, 8)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=2), 1, atol=1e-5)
    kernels = [np.linalg.lstsq(shared, one, rcond=None)[0] for one in sets]
    for kernel, one in zip(kernels, sets, strict=True):
        np.testing.assert_allclose(shared @ kernel, one, atol=1e-5)
        assert 0.1 < np.abs(kernel - np.eye(8)).max() < math.sqrt(6 / 16) + 1e-3  # Glorot's bound
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1, "heads that start equal stay equal"


class Table:
    """A table of 40 random embeddings."""

    def __init__(self) -> None:
        self.rows = tf.constant(np.random.default_rng(1).normal(size=(40, 8)), tf.float32)

    def lookup(self, codes: tf.Tensor) -> tf.Tensor:
        return tf.gather(self.rows, codes)

    def bag(self, tokens: Tokens) -> tf.Tensor:
        return tf.reduce_sum(tf.RaggedTensor.from_row_splits(self.lookup(tokens.values), tokens.row_splits), axis=1)


@pytest.mark.parametrize("make", [transformer.alone, transformer.beside_the_sum])
def test_a_transformer_reads_the_order_and_no_padding(make: object) -> None:
    tf.keras.utils.set_random_seed(1)
    encode = make(ModelConfig(token_dim=8))  # type: ignore[operator]

    def vectors(*texts: list[int]) -> np.ndarray:
        ragged = tf.ragged.constant(texts, tf.int32, row_splits_dtype=tf.int64)
        return encode(EncoderInput(Tokens(ragged.values, ragged.row_splits), Table(), "query")).numpy()

    together = vectors([1, 2, 3], [3, 2, 1], list(range(30)), [4])
    assert together.shape == (4, 8) and np.isfinite(together).all()
    np.testing.assert_allclose(vectors([1, 2, 3])[0], together[0], atol=1e-5)
    np.testing.assert_allclose(vectors([4])[0], together[3], atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-3
    assert np.isfinite(vectors([], list(range(5)) * 20)).all()


def test_the_chance_of_relevance_is_that_of_all_pairs_of_clicks(shop: Shop) -> None:
    found = claims.chance_of_relevance(shop)
    log = pyarrow.parquet.read_table(shop.directory.path / "interactions").to_pylist()
    clicks = [(row["query"], row["item_id"]) for row in log if row["event"] == "click"]
    queries, misspelt = shop.truth_table("queries"), shop.truth_table("misspellings")
    right = dict(zip(misspelt["query"], misspelt["right"], strict=True))
    meanings = dict(zip(queries["query"], queries["meanings"], strict=True))
    relevant, clicked = {}, {}
    for query, item in clicks:
        relevant[query] = set().union(*(shop.meanings[one] for one in meanings[right.get(query, query)]))
        clicked.setdefault(query, set()).add(item)
    items = [item for _, item in clicks]
    for name, sets in (("batch", relevant), ("clicked", clicked)):
        of_query = {query: sum(item in wanted for item in items) / len(items) for query, wanted in sets.items()}
        assert found[name] == pytest.approx(np.mean([of_query[query] for query, _ in clicks]))
    assert found["random"] == pytest.approx(np.mean([len(relevant[query]) for query, _ in clicks]) / SIZE.items)
    assert found["click"] == pytest.approx(np.mean([item in relevant[query] for query, item in clicks]))
    assert found["click"] > 0.8 and 0 < found["random"] < 0.2 and 0 < found["batch"] < 0.2


def test_silhouettes_of_queries_with_several_meanings(shop: Shop) -> None:
    queries = PolysemousQueries(shop)
    assert {"all", "homonyms"} <= queries.groups.keys() and len(queries.queries) == len(queries.groups["all"])
    items = shop.truth_table("items")
    types = dict(zip(items["item_id"], items["type"], strict=True))
    names = sorted(set(types.values()))
    ids = shop.opened_store.items()["id"].tolist()
    apart = np.eye(len(names), dtype=np.float32)[[names.index(types[item]) for item in ids]]
    mixed = np.random.default_rng(1).normal(size=apart.shape).astype(np.float32)
    homonyms = queries.groups["homonyms"]
    np.testing.assert_allclose(queries.silhouettes(apart)[homonyms], 1)
    assert np.abs(queries.silhouettes(mixed)[homonyms]).max() < 0.1


def test_judgments_with_the_language_of_each_query(shop: Shop) -> None:
    rows = [row.split("\t") for row in experiments._judgments_with_languages(shop).read_text().splitlines()]
    plain = [row.split("\t") for row in (shop.directory.path / "judgments.test.tsv").read_text().splitlines()]
    assert [row[:-1] for row in rows] == plain and rows[0][-1] == "kind_and_language"
    for query, *_, kind, both in rows[1:]:
        is_chinese = any("\u4e00" <= letter <= "\u9fff" for letter in query)
        assert both == f"{kind}, {'zh' if is_chinese else 'en'}"
    assert {"zh", "en"} == {row[-1].split(", ")[1] for row in rows[1:]}


@pytest.mark.long
def test_all_variants_are_trained_and_shown(shop: Shop, capfd: pytest.CaptureFixture) -> None:
    found = claims.claims(shop)
    for group, variants in claims.GROUPS.items():
        measured = found["groups"][group]["variants"]
        assert list(measured) == list(variants)
        for one in measured.values():
            assert list(one["by_step"]) == (["1", "2", "4", "8"] if group == "steps" else ["8"])
            assert one["step_ms"] > 0 and one["query_ms"] > 0 and 0 <= one["senses@10"] <= 1
    weights = [one["parameters"] for one in found["groups"]["embedding sets"]["variants"].values()]
    tokens, dim = shop.opened_store.vocabulary.num_ids, 64
    # A set for each of two heads, without the projections' kernels and biases.
    assert weights[1] - weights[0] == 2 * tokens * dim - 2 * (dim * dim + dim)
    encoders = list(found["groups"]["text encoder"]["variants"].values())
    assert encoders[0]["parameters"] < encoders[1]["parameters"] == encoders[2]["parameters"]

    page = sections.Report()
    sections._training_claims(page, [found])
    for variants in claims.GROUPS.values():
        for name in variants:
            assert f"| {name} |" in page.markdown
    assert "| 3 | α 0 |" in page.markdown and "%" in page.markdown
    capfd.readouterr()
    assert claims.claims(shop) == found and not capfd.readouterr().out, "results are kept"


def test_mask_negatives_and_towers_of_a_variant_reach_the_training(shop: Shop) -> None:
    variants = {
        "plain": claims.Variant(),
        "unmasked": claims.Variant(masked=False),
        "own": claims.Variant({"train.mixing_ratio": 1.0}, own_random=2),
        "sets": claims.Variant(towers=claims.EmbeddingSets),
    }
    vectors = {}
    for name, variant in variants.items():
        training = claims._Training(shop, variant)
        search = training.after(3)
        vectors[name] = search._item_embeddings
        training.close()
    again = claims._Training(shop, claims.Variant())
    np.testing.assert_array_equal(again.after(3)._item_embeddings, vectors["plain"])
    again.close()
    for name in ("unmasked", "own", "sets"):
        assert np.abs(vectors[name] - vectors["plain"]).max() > 1e-4, name
