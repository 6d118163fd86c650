"""The batches of a rewriter: a function of store, options, step and worker; each kind of example in its share."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import Shop

from dpsr_common import command_line
from dpsr_common.errors import CommandError
from dpsr_tf.data.rewriting_batches import RewritingBatches, RewritingOptions
from dpsr_tf.data.store import Store
from dpsr_tf.ops._native import TitlePieces, shortened
from dpsr_tokenizer import Vocabulary, WordSequences

CLEAN = RewritingOptions(batch_size=40, pair_batch_size=40, typo_rate=0, form_rate=0, drop_rate=0)


def ingest(
    path: Path, log: bool = True, shards: int = 1, titles: Sequence[str] | None = None, **rewriting: Any
) -> Store:
    """A store of 30 items and 20 queries: two wordings of ten things, one of which has most clicks."""
    shop = Shop(path / "shop")
    things = [f"thing{chr(97 + i)}" for i in range(10)]
    shop.items = [{"item_id": i, "title": f"Good {things[i % 10].title()}, sort {i}", "brand": "b"} for i in range(30)]
    for item, title in zip(shop.items, titles or [], strict=False):
        item["title"] = title
    shop.log = [
        {
            "query": f"{owner} {name}",
            "item_id": item,
            "user_id": 5,
            "weight": clicks * (9.0 if name == "thinga" else 1.0),
            "label": 2,
        }
        for number, name in enumerate(things)
        for item in range(number, 30, 10)
        for owner, clicks in (("my", 1.0), ("your", 4.0))
    ]
    shop.schema["rewriting"] = {"meaning_share": 0, "min_count": 1, **rewriting}
    shop.schema["items"]["text"] = ["title"]
    if not log:
        del shop.schema["interactions"]
    path.mkdir(parents=True, exist_ok=True)
    shop.write(".jsonl")
    assert command_line.main([*shop.flags(path / "store"), f"--shards={shards}"]) == 0
    return Store(path / "store")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return ingest(tmp_path_factory.mktemp("rewriting"))


def texts(store: Store, words: np.ndarray) -> list[str]:
    """The texts of sequences of ids."""
    table = WordSequences(Vocabulary(store.words_path)).texts()
    return ["".join(table[i] for i in row).strip() for row in words]


def assert_equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert list(a) == list(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], name)


def test_shapes_and_types(store: Store) -> None:
    batch = RewritingBatches(store, RewritingOptions(batch_size=7, pair_batch_size=5)).batch(0)
    found = {name: (str(values.dtype), values.shape) for name, values in batch.items()}
    assert found == {
        "queries": ("object", (7,)),
        "query_words": ("int32", (7, 12)),
        "titles": ("object", (7,)),
        "title_words": ("int32", (7, 24)),
        "weights": ("float32", (7,)),
        "pair_source": ("object", (5,)),
        "pair_words": ("int32", (5, 12)),
        "pair_weights": ("float32", (5,)),
    }
    for name in ("query_words", "title_words", "pair_words"):
        assert ((batch[name] == WordSequences.END).sum(axis=1) == 1).all()
        ends = (batch[name] == WordSequences.END).argmax(axis=1)
        for row, end in zip(batch[name], ends, strict=True):
            assert (row[:end] > 0).all() and not row[end + 1 :].any()


def test_a_batch_is_a_function_of_seed_step_and_worker(store: Store) -> None:
    options = RewritingOptions(batch_size=16, pair_batch_size=16, seed=3)
    batches = RewritingBatches(store, options)
    following = batches.batches(first_step=5)
    again = RewritingBatches(store, options)
    for step in (5, 6):
        assert_equal(next(following), again.batch(step))
    others = [
        again.batch(7),
        RewritingBatches(store, dataclasses.replace(options, seed=4)).batch(5),
        RewritingBatches(store, options, worker_index=1, num_workers=2).batch(5),
    ]
    for other in others:
        assert (other["queries"] != again.batch(5)["queries"]).any()


def test_queries_have_titles_that_were_clicked(store: Store) -> None:
    batch = RewritingBatches(store, dataclasses.replace(CLEAN, title_queries=0)).batch(1)
    assert texts(store, batch["query_words"]) == [text.decode() for text in batch["queries"]]
    titles = [title.decode() for title in batch["titles"]]
    assert texts(store, batch["title_words"]) == WordSequences.normal(titles)
    for query, title in zip(batch["queries"], titles, strict=True):
        assert query.decode().split()[1] in title.lower()
    assert (batch["weights"] == 1).all()


def test_queries_are_drawn_by_their_clicks(store: Store) -> None:
    counts: dict[float, collections.Counter[bytes]] = {}
    for power in (0.0, 1.0):
        options = dataclasses.replace(CLEAN, title_queries=0, batch_size=20_000, pair_batch_size=0, click_power=power)
        counts[power] = collections.Counter(RewritingBatches(store, options).batch(0)["queries"])
    assert counts[0.0][b"my thingc"] == pytest.approx(1000, rel=0.15)
    # 15 clicks for each of nine things, 135 for one.
    assert counts[1.0][b"your thinga"] == pytest.approx(20_000 * 108 / 270, rel=0.1)
    assert counts[1.0][b"my thingc"] == pytest.approx(20_000 * 3 / 270, rel=0.3)


def test_pieces_of_titles_are_queries_of_items_without_clicks(store: Store) -> None:
    batch = RewritingBatches(store, dataclasses.replace(CLEAN, title_queries=1, title_subsampling=0)).batch(2)
    for query, words, title in zip(batch["queries"], texts(store, batch["query_words"]), batch["titles"], strict=True):
        assert query.decode() == words and words
        assert set(words.split()) <= set(WordSequences.normal([title])[0].split())


def test_pairs_come_in_their_shares(store: Store) -> None:
    options = dataclasses.replace(CLEAN, title_pairs=0.5, query_pairs=0.45, title_subsampling=0)
    batch = RewritingBatches(store, options).batch(3)
    sources, targets = [text.decode() for text in batch["pair_source"]], texts(store, batch["pair_words"])
    assert sources[:18] == targets[:18], "queries without noise are what is written"
    # 20 pairs of queries, so one in a batch.
    (source, target) = sources[18], targets[18]
    assert source != target and source.split()[1] == target.split()[1]
    assert sources[19:] == targets[19:] and len(sources) == 40
    assert not any(text.startswith(("my", "your")) for text in sources[19:])


def test_noise_is_in_what_is_read(store: Store) -> None:
    options = dataclasses.replace(CLEAN, title_queries=0.5, title_pairs=0.5, query_pairs=0.5, typo_rate=0.5)
    batch = RewritingBatches(store, options).batch(0)
    for noisy, clean in (("queries", "query_words"), ("pair_source", "pair_words")):
        right = texts(store, batch[clean])
        wrong = [text.decode() != other for text, other in zip(batch[noisy], right, strict=True)]
        assert 0.3 < np.mean(wrong) < 0.9, noisy
        known = {word for text in [*store.queries(), *WordSequences.normal(store.titles())] for word in text.split()}
        assert set(" ".join(right).split()) <= known
    short = dataclasses.replace(CLEAN, title_queries=0, drop_rate=0.5)
    batch = RewritingBatches(store, short).batch(0)
    lengths = [len(text.split()) for text in batch["queries"]]
    assert min(lengths) == 1 and max(lengths) == 2
    assert all(len(text.split()) == 2 for text in texts(store, batch["query_words"]))


def test_words_have_other_forms(tmp_path: Path) -> None:
    stems = ["lamp", "door", "chair", "table", "window", "garden", "blind", "screw", "hinge", "bracket", "panel"]
    store = ingest(tmp_path, titles=[stem + ending for stem in stems for ending in ("", "s")])
    options = dataclasses.replace(CLEAN, form_rate=0.9, title_pairs=1, query_pairs=0, title_subsampling=0)
    batch = RewritingBatches(store, dataclasses.replace(options, pair_batch_size=500)).batch(0)
    read = [text.decode() for text in batch["pair_source"]]
    forms = {(one, other) for one, other in zip(read, texts(store, batch["pair_words"]), strict=True) if one != other}
    assert forms and forms <= {(s + a, s + b) for s in stems for a, b in (("", "s"), ("s", ""))}
    assert len(forms) > len(stems)


def test_frequent_words_are_rare_in_pieces(store: Store) -> None:
    share = {}
    for subsampling in (0.0, 0.01):
        options = dataclasses.replace(CLEAN, title_pairs=1, query_pairs=0, title_subsampling=subsampling)
        options = dataclasses.replace(options, pair_batch_size=2_000)
        share[subsampling] = np.mean(
            ["good" in text.split() for text in texts(store, RewritingBatches(store, options).batch(0)["pair_words"])]
        )
    assert share[0.01] < 0.5 * share[0.0]


def test_a_catalogue_gives_pieces_of_titles(tmp_path: Path) -> None:
    store = ingest(tmp_path, log=False)
    batch = RewritingBatches(store, CLEAN).batch(0)
    assert len(batch["queries"]) == len(batch["pair_source"]) == 40
    assert texts(store, batch["pair_words"]) == [text.decode() for text in batch["pair_source"]]


def test_sequences_are_cut_off(tmp_path: Path) -> None:
    store = ingest(tmp_path, max_query_words=2, max_title_words=3)
    batch = RewritingBatches(store, dataclasses.replace(CLEAN, title_queries=0)).batch(0)
    assert batch["query_words"].shape == (40, 2) and batch["title_words"].shape == (40, 3)
    assert set(texts(store, batch["query_words"])) == {"my", "your"}


def test_unknown_words_alone_have_no_weight(tmp_path: Path) -> None:
    store = ingest(tmp_path, min_count=10)
    batch = RewritingBatches(store, dataclasses.replace(CLEAN, title_pairs=1, query_pairs=0)).batch(0)
    written = texts(store, batch["pair_words"])
    assert "" in written and any(written)
    np.testing.assert_array_equal(batch["pair_weights"], [float(text != "") for text in written])


def test_workers_share_the_files(tmp_path: Path) -> None:
    store = ingest(tmp_path, shards=4)
    options = dataclasses.replace(CLEAN, title_queries=0, batch_size=400, pair_batch_size=40)
    seen = []
    for worker in range(2):
        batches = RewritingBatches(store, options, worker, 2)
        seen.append(set(batches.batch(0)["queries"]))
        pairs = batches.batch(0)
        assert len(pairs["pair_source"]) == 40
    assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == 20
    many = [set(RewritingBatches(store, options, worker, 5).batch(0)["queries"]) for worker in range(5)]
    assert all(len(queries) == 20 for queries in many), "more workers than files read all of them"
    one = RewritingBatches(store, dataclasses.replace(options, query_pairs=1.0, title_pairs=0.0)).batch(0)
    assert texts(store, one["pair_words"]) == [text.decode() for text in one["pair_source"]]


def test_a_store_without_sequences_is_refused(click_store: Store) -> None:
    with pytest.raises(CommandError, match=r"holds no sequences of words.*add the section `rewriting`"):
        RewritingBatches(click_store, CLEAN)


# The noise of arrays of texts.


def arrays(items: list[str]) -> tuple[np.ndarray, np.ndarray]:
    data = [text.encode() for text in items]
    return np.frombuffer(b"".join(data), np.uint8), np.cumsum([0, *map(len, data)]).astype(np.int64)


def test_noise_of_a_text_depends_on_its_seed_only() -> None:
    names = ["rain shower head", "", "手机 壳", "garden hose reel", "saw"]
    seeds = np.arange(5, dtype=np.uint64) + 7
    every = shortened(*arrays(names), seeds, drop_rate=0.3, typo_rate=0.5)
    for i, name in enumerate(names):
        assert shortened(*arrays([name]), seeds[i : i + 1], drop_rate=0.3, typo_rate=0.5) == [every[i]]
    assert shortened(*arrays(names), seeds, drop_rate=0, typo_rate=0) == [name.encode() for name in names]
    pieces, noisy = TitlePieces({})(*arrays(names), seeds, typo_rate=0.0)
    assert pieces == noisy and pieces[1] == b""
    pieces, noisy = TitlePieces({"shower": 0.0, "rain": 0.0})(*arrays(names), seeds, typo_rate=1.0)
    assert pieces[0] == b"head" and noisy[0] != b"head"


def test_arrays_that_do_not_fit_are_refused() -> None:
    data, splits = arrays(["ab", "cd"])
    seeds = np.zeros(2, np.uint64)
    with pytest.raises(ValueError, match="got 3 splits for 1 seeds"):
        shortened(data, splits, seeds[:1], drop_rate=0, typo_rate=0)
    with pytest.raises(ValueError, match="split 2 is 9, expected 2 to 4"):
        shortened(data, np.array([0, 2, 9]), seeds, drop_rate=0, typo_rate=0)
    with pytest.raises(ValueError, match="split 1 is -1, expected 0 to 4"):
        TitlePieces({})(data, np.array([0, -1, 4]), seeds, typo_rate=0)
    with pytest.raises(ValueError, match=r"drop_rate is 1\.5, expected 0 to 1"):
        shortened(data, splits, seeds, drop_rate=1.5, typo_rate=0)
    with pytest.raises(ValueError, match="red is -1, expected 0 to 1"):
        TitlePieces({"red": -1.0})


def test_schema_of_sequences_is_checked(tmp_path: Path) -> None:
    shop = Shop(tmp_path / "shop")
    shop.schema["rewriting"] = {"max_query_words": 1}
    shop.write()
    (shop.path / "schema.yaml").write_text(yaml.safe_dump(shop.schema))
    assert command_line.main(shop.flags(tmp_path / "store")) == 2
