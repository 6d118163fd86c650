"""What a store holds for a rewriter: words in their order, clicks, and pairs of queries, against brute force."""

from __future__ import annotations

import collections
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dpsr_common.errors import CommandError
from dpsr_tf.data.store import Store, unpack_strings
from dpsr_tokenizer import Tokenizer, Vocabulary, WordSequences

COLORS = {"pink": ["pink", "rosy"], "black": ["black", "dark"]}
TYPES = {"running shoes": ["trainers", "joggers"], "desk lamp": ["lamp", "table light"], "手机壳": ["手机壳", "保护套"]}
ITEMS = [
    {"item_id": 10 * (i + 1), "title": f"Acme {color.title()} {kind} no{i}"}
    for i, (color, kind) in enumerate((c, k) for _ in range(3) for c in COLORS for k in TYPES)
]
SCHEMA: dict[str, Any] = {
    "items": {"files": "items.jsonl", "id": "item_id", "text": ["title"]},
    "users": {"files": "users.jsonl", "id": "user_id"},
    "interactions": {
        "files": "log.jsonl",
        "query": "query",
        "item": "item_id",
        "user": "user_id",
        "type": "type",
        "time": "time",
        "session": "session",
        "weight": "weight",
    },
    "rewriting": {},
}
DAY = 86_400


def clicks() -> list[dict[str, Any]]:
    """Every wording of every color and kind, clicked on the items of that color and kind, and wider ones."""
    log = []

    def click(query: str, item: int, weight: float = 4.0) -> None:
        row = {"query": query, "item_id": item, "user_id": -1, "type": "click", "time": 100 * DAY, "session": None}
        log.append(row | {"weight": weight})

    for item in ITEMS:
        for color, colors in COLORS.items():
            for kind, kinds in TYPES.items():
                if kind not in item["title"]:
                    continue
                for word in kinds:
                    if color.title() in item["title"]:
                        for adjective in colors:
                            click(f"{adjective} {word}", item["item_id"])
                    click(word, item["item_id"], 1.5)
    # A misspelt query, the same words otherwise written, another number, a query that drifts by a stray click.
    click("rosy trainrs", ITEMS[0]["item_id"], 1.0)
    click("  ROSY, Trainers ", ITEMS[0]["item_id"], 2.0)
    click("rosy trainers 42", ITEMS[0]["item_id"], 8.0)
    click("dark table light", ITEMS[0]["item_id"], 1.0)
    return log


def visit(session: str, minute: float, query: str, item: int | None) -> dict[str, Any]:
    """One row of a session: a click, or an impression of the first item."""
    return {
        "query": query,
        "item_id": item or ITEMS[0]["item_id"],
        "user_id": 1,
        "type": "click" if item else "impression",
        "time": int(100 * DAY + 60 * minute),
        "session": session,
        "weight": 1.0,
    }


def write(path: Path, log: list[dict[str, Any]], schema: dict[str, Any] = SCHEMA, **rewriting: Any) -> list[str]:
    """Writes the tables; returns the flags of `dpsr ingest` up to --out."""
    path.mkdir(exist_ok=True)
    tables = {"items": ITEMS, "users": [{"user_id": user} for user in (1, 2)], "log": log}
    for name, rows in tables.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "schema.yaml").write_text(yaml.safe_dump(schema | {"rewriting": rewriting}))
    return ["ingest", f"--schema={path / 'schema.yaml'}"]


@pytest.fixture
def ingest(tmp_path: Path, dpsr: Callable[..., Any]) -> Callable[..., Store]:
    """Ingests a log. Returns the store."""

    def run(log: list[dict[str, Any]], name: str = "store", *flags: str, **rewriting: Any) -> Store:
        dpsr(*write(tmp_path / "shop", log, **rewriting), f"--out={tmp_path / name}", *flags).succeeds()
        return Store(tmp_path / name)

    return run


def queries_of(store: Store) -> list[str]:
    return [text for file in store.rewriting() for text in unpack_strings(file, "query_text")]


def lists_of(store: Store, name: str, other: str) -> dict[str, list[tuple[int, float]]]:
    """Query text -> its clicks or pairs as (row, weight)."""
    found = {}
    for file in store.rewriting():
        splits = file[f"{name}.splits"]
        rows, weights = file[f"{name}.{other}"].tolist(), file[f"{name}.weight"].tolist()
        for i, text in enumerate(unpack_strings(file, "query_text")):
            begin, end = splits[i], splits[i + 1]
            found[text] = list(zip(rows[begin:end], weights[begin:end], strict=True))
    return found


def pairs_of(store: Store) -> dict[str, dict[str, float]]:
    """Query text -> text of each query that it may be rewritten to, strongest first, with the weight."""
    texts = queries_of(store)
    return {
        text: {texts[row]: weight for row, weight in found}
        for text, found in lists_of(store, "pair", "query").items()
        if found
    }


def test_queries_with_equal_words_are_one(ingest: Callable[..., Store]) -> None:
    log = clicks()
    store = ingest(log)
    expected: dict[str, dict[int, float]] = collections.defaultdict(lambda: collections.defaultdict(float))
    rows = {int(item): row for row, item in enumerate(store.items()["id"])}
    for row in log:
        text = WordSequences.normal([row["query"]])[0]
        expected[text][rows[row["item_id"]]] += row["weight"]
    assert queries_of(store) == sorted(expected, key=str.encode)
    assert lists_of(store, "click", "item") == {text: sorted(items.items()) for text, items in expected.items()}
    totals = np.concatenate([file["query.clicks"] for file in store.rewriting()])
    np.testing.assert_allclose(totals, [sum(expected[text].values()) for text in queries_of(store)])


def test_words_are_in_order(ingest: Callable[..., Store]) -> None:
    store = ingest(clicks(), min_count=2, max_query_words=3, max_title_words=4)
    words = WordSequences(Vocabulary(store.words_path))
    texts = np.array(words.texts(), object)
    sequences = store.sequences()
    assert sequences is not None
    tokenize = Tokenizer(WordSequences.config()).tokenize
    for file, name, sentences, limit in (
        (sequences, "title", store.titles(), 3),
        (store.rewriting()[0], "query", queries_of(store), 2),
    ):
        for text, row in zip(sentences, np.split(file[f"{name}.words"], file[f"{name}.splits"][1:-1]), strict=True):
            known = [word if f" {word}" in texts or word in texts else "" for word in tokenize(text)[:limit]]
            assert [texts[i].strip() for i in row] == known, text
    assert " no3" not in texts, "a word of one title has no id of its own"
    assert store.manifest["rewriting"]["words"] == len(words) - 4


def test_pairs_mean_the_same(ingest: Callable[..., Store]) -> None:
    meaning = {f"{a} {w}": (c, k) for c, aa in COLORS.items() for k, ww in TYPES.items() for a in aa for w in ww}
    meaning |= {w: ("", k) for k, ww in TYPES.items() for w in ww}
    meaning = {WordSequences.normal([text])[0]: found for text, found in meaning.items()}
    pairs = pairs_of(ingest(clicks()))
    for text, others in pairs.items():
        for other in others:
            if text in meaning and other in meaning:
                assert meaning[text] == meaning[other], (text, other)
    assert set(pairs["rosy trainers"]) == {"rosy joggers", "pink joggers", "pink trainers"}
    assert set(pairs["trainers"]) == {"joggers"}, "a rewrite asks for no color that the query does not ask for"
    assert "粉" not in "".join(pairs) and set(pairs["手机壳"]) == {"保护套"}


def test_a_misspelt_word_is_read_as_the_word_that_it_is_spelt_like(ingest: Callable[..., Store]) -> None:
    pairs = pairs_of(ingest(clicks()))
    assert "rosy trainers" in pairs["rosy trainrs"]
    assert "dark trainers" not in pairs["rosy trainrs"]
    numbers = pairs.get("rosy trainers 42", {})
    assert not numbers, "a rewrite has the numbers of the query"


def test_without_the_filter_pairs_drift(ingest: Callable[..., Store]) -> None:
    loose = pairs_of(ingest(clicks(), meaning_share=0, min_similarity=0))
    assert "rosy trainers" in loose["dark table light"]
    strict = ingest(clicks(), "strict", min_similarity=0)
    assert "rosy trainers" not in pairs_of(strict).get("dark table light", {})
    dropped = strict.manifest["rewriting"]["dropped"]
    assert dropped["other_meaning"] > 0 and dropped["other_numbers"] > 0 and dropped["no_new_word"] > 0
    for text, others in loose.items():
        for other in others:
            assert not set(other.split()) <= set(text.split()), "a rewrite has a new word"


def test_weight_is_the_cosine_of_damped_clicks(ingest: Callable[..., Store]) -> None:
    store = ingest(clicks())
    vectors = {
        text: {item: np.log1p(weight) for item, weight in found}
        for text, found in lists_of(store, "click", "item").items()
    }
    length = {text: np.sqrt(sum(x * x for x in v.values()) + np.log(2) ** 2) for text, v in vectors.items()}
    for text, others in pairs_of(store).items():
        assert list(others.values()) == sorted(others.values(), reverse=True)
        for other, weight in others.items():
            dot = sum(x * vectors[other].get(item, 0) for item, x in vectors[text].items())
            assert weight == pytest.approx(dot / length[text] / length[other], abs=2e-3)


def test_a_query_keeps_its_strongest_pairs(ingest: Callable[..., Store]) -> None:
    all_pairs, some = pairs_of(ingest(clicks())), pairs_of(ingest(clicks(), "some", max_pairs=1))
    assert some == {text: dict([next(iter(others.items()))]) for text, others in all_pairs.items()}
    assert not pairs_of(ingest(clicks(), "none", max_pairs=0))


def test_what_people_ask_next_explains_unknown_words(ingest: Callable[..., Store]) -> None:
    shoes = ITEMS[0]["item_id"]
    sessions = [
        row
        for i in range(4)
        for row in (visit(f"s{i}", 0, "pink plimsolls", None), visit(f"s{i}", 2, "pink trainers", shoes))
    ]
    # Once only; after too long; after a click; without a click.
    sessions += [visit("once", 0, "pink sneekers", None), visit("once", 1, "pink trainers", shoes)]
    for i in range(4):
        sessions += [visit(f"late{i}", 0, "pink wellies", None), visit(f"late{i}", 40, "pink trainers", shoes)]
        sessions += [visit(f"happy{i}", 0, "rosy joggers", shoes), visit(f"happy{i}", 1, "dark lamp", 20)]
        sessions += [visit(f"sad{i}", 0, "pink pumps", None), visit(f"sad{i}", 1, "dark lamp", None)]
        # A known word is not given up.
        sessions += [visit(f"drift{i}", 0, "dark plimsolls", None), visit(f"drift{i}", 1, "pink trainers", shoes)]
    log = clicks() + sessions
    pairs = pairs_of(ingest(log, min_lift=2))
    assert pairs["pink plimsolls"] == {"pink trainers": pytest.approx(1.0)}, "it followed all four visits"
    for text in ("pink sneekers", "pink wellies", "pink pumps", "dark plimsolls"):
        assert text not in pairs
    assert "dark lamp" not in pairs["rosy joggers"]
    assert "pink sneekers" in pairs_of(ingest(log, "once", min_lift=2, min_reformulations=1))
    assert "pink plimsolls" not in pairs_of(ingest(log, "off", min_lift=2, reformulation_minutes=0))
    assert "pink plimsolls" not in pairs_of(ingest(log, "lift"))


def test_held_out_interactions_say_nothing(ingest: Callable[..., Store], tmp_path: Path) -> None:
    shoes = ITEMS[0]["item_id"]
    late = [{**row, "query": f"late {row['query']}", "time": 200 * DAY} for row in clicks()]
    late += [
        {**row, "time": row["time"] + 100 * DAY}
        for i in range(4)
        for row in (visit(f"s{i}", 0, "pink plimsolls", None), visit(f"s{i}", 2, "pink trainers", shoes))
    ]
    interactions = SCHEMA["interactions"] | {"held_out": {"last_days": 1}}
    with_held = ingest_with(tmp_path, clicks() + late, SCHEMA | {"interactions": interactions})
    before = ingest(clicks(), "before")
    assert queries_of(with_held) == queries_of(before) and pairs_of(with_held) == pairs_of(before)


def ingest_with(path: Path, log: list[dict[str, Any]], schema: dict[str, Any]) -> Store:
    from dpsr_common import command_line

    assert command_line.main([*write(path / "other", log, schema), f"--out={path / 'with'}"]) == 0
    return Store(path / "with")


def test_shards_threads_and_order_change_nothing(
    ingest: Callable[..., Store], tree: Callable[[Path], dict[str, bytes | None]]
) -> None:
    log = clicks() + [visit("s", i, "pink plimsolls" if i % 2 else "rosy joggers", 10 * (i % 2)) for i in range(8)]
    one = ingest(log, "one", "--threads=1")
    other = ingest([log[i] for i in np.random.default_rng(2).permutation(len(log))], "two", "--threads=3")
    assert tree(one.path) == tree(other.path)
    sharded = ingest(log, "sharded", "--shards=3")
    assert len(sharded.rewriting()) == 3
    assert pairs_of(sharded) == pairs_of(one)
    assert lists_of(sharded, "click", "item") == lists_of(one, "click", "item")


def test_appended_days_give_the_store_of_all_days(
    ingest: Callable[..., Store], tmp_path: Path, tree: Callable[[Path], dict[str, bytes | None]]
) -> None:
    log = [*clicks(), visit("s", 0, "pink plimsolls", None), visit("s", 1, "pink trainers", 10)]
    ingest(log[: len(log) // 2], "first", "--keep_log")
    second = ingest(log[len(log) // 2 :], "second", f"--append={tmp_path / 'first'}")
    both = ingest(log, "both", "--keep_log")
    for name in ("rewriting.dpsr", "sequences.dpsr", "vocabulary.words.dpsr"):
        assert (second.path / name).read_bytes() == (both.path / name).read_bytes(), name


def test_a_catalogue_has_words_and_no_queries(tmp_path: Path, dpsr: Callable[..., Any]) -> None:
    schema = {key: value for key, value in SCHEMA.items() if key not in ("interactions", "users")}
    dpsr(*write(tmp_path / "shop", [], schema), f"--out={tmp_path / 'store'}").succeeds()
    store = Store(tmp_path / "store")
    assert queries_of(store) == [] and store.manifest["rewriting"]["pairs"] == 0
    sequences = store.sequences()
    assert sequences is not None and len(sequences["title.splits"]) == len(ITEMS) + 1


def test_a_store_without_the_section_is_as_before(tmp_path: Path, dpsr: Callable[..., Any]) -> None:
    flags = write(tmp_path / "shop", clicks())
    (tmp_path / "shop" / "schema.yaml").write_text(
        yaml.safe_dump({key: value for key, value in SCHEMA.items() if key != "rewriting"})
    )
    dpsr(*flags, f"--out={tmp_path / 'store'}").succeeds()
    store = Store(tmp_path / "store")
    assert store.sequences() is None and store.rewriting() == []
    assert "rewriting" not in store.manifest and "rewriting" not in store.manifest["schema"]
    assert not list(store.path.glob("*words*"))


def test_items_and_queries_without_words(tmp_path: Path, dpsr: Callable[..., Any]) -> None:
    log = [row | {"query": "!?"} for row in clicks()[:3]]
    flags = write(tmp_path / "shop", [*log, visit("s", 0, "...", None), visit("s", 1, "?", 10)], min_count=1)
    items = [{**item, "title": [None, "", "!"][i % 3]} for i, item in enumerate(ITEMS)]
    (tmp_path / "shop" / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in [*items, ITEMS[0]][1:]))
    dpsr(*flags, f"--out={tmp_path / 'nothing'}", "--max_reject_fraction=1").succeeds()
    store = Store(tmp_path / "nothing")
    assert queries_of(store) == [] and store.manifest["rewriting"]["pairs"] == 0
    (tmp_path / "shop" / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*log, *clicks()]))
    dpsr(*flags, f"--out={tmp_path / 'some'}", "--max_reject_fraction=1").succeeds()
    assert "rosy trainers" in queries_of(Store(tmp_path / "some"))


def test_no_frequent_word_is_an_error(tmp_path: Path, dpsr: Callable[..., Any]) -> None:
    flags = write(tmp_path / "shop", clicks(), min_count=1000)
    dpsr(*flags, f"--out={tmp_path / 'store'}").fails(1, "rewriting: ", "lower min_count")


@pytest.mark.parametrize("name", ["rewriting.dpsr", "sequences.dpsr", "vocabulary.words.dpsr"])
def test_damaged_files_are_refused(ingest: Callable[..., Store], name: str) -> None:
    path = ingest(clicks()).path
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[:-40])
    with pytest.raises(CommandError, match=rf"{name}.*ingest the log again"):
        Store(path)
    (path / name).unlink()
    with pytest.raises(CommandError, match=rf"{name}.*ingest the log again"):
        Store(path)


def test_a_models_words_are_taken_over(ingest: Callable[..., Store], tmp_path: Path, dpsr: Callable[..., Any]) -> None:
    first = ingest(clicks())
    model = tmp_path / "model"
    (model / "codes").mkdir(parents=True)
    (model / "config.yaml").write_text("")
    (model / "codes" / "codes.json").write_text("{}")
    (model / "vocabulary.words.dpsr").write_bytes(first.words_path.read_bytes())
    (model / "vocabulary.dpsr").write_bytes(first.vocabulary_path.read_bytes())
    log = [{**row, "query": f"sturdy {row['query']}"} for row in clicks()]
    second = ingest(log, "second", f"--like={model}")
    assert second.words_path.read_bytes() == first.words_path.read_bytes()
    assert " sturdy" in WordSequences(Vocabulary(ingest(log, "third").words_path)).texts()
