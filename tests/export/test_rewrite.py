"""`dpsr rewrite`: its filters, the lists that people keep, the table, and explanations."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dpsr_common.command_line import main
from dpsr_common.errors import CommandError, UsageError
from dpsr_export import rewrite
from dpsr_export.rewrite_filters import Filters, Limits, TitleIndex, frequent_queries, value_names
from dpsr_export.rewrite_table import key_of
from dpsr_tf.data.store import Store

TITLES = [
    "Acme cordless drill 12v", "Acme power drill 18v", "Bolt Tools power screwdriver 12v", "Bolt Tools drill bits",
    "large red bucket", "small red pail", "red pail large", "power drill stand", "手机 红色", "移动电话 红色",
]  # fmt: skip
BRANDS = ["Acme", "Acme", "Bolt Tools", "Bolt Tools", "None", "", None, None, "手", None]
CLICKS = {"Cordless drill": [0, 0, 0, 1, 1, 7], "red bucket": [4, 6], "acme drill 12v": [0], "!!": [1, 1, 1]}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Ten items with brands, some of which are odd, and four queries."""
    folder = tmp_path_factory.mktemp("rewrite")
    items = [{"item": i, "title": title, "brand": BRANDS[i]} for i, title in enumerate(TITLES)]
    log = [{"query": query, "item": item} for query, clicked in CLICKS.items() for item in clicked]
    for name, rows in (("items", items), ("log", log)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    schema = {
        "items": {"files": "items.jsonl", "id": "item", "text": ["title"], "filters": ["brand"]},
        "interactions": {"files": "log.jsonl", "query": "query", "item": "item"},
        "vocabulary": {"min_count": 1},
    }
    (folder / "schema.yaml").write_text(yaml.safe_dump(schema))
    assert main(["ingest", f"--schema={folder / 'schema.yaml'}", f"--out={folder / 'store'}"]) == 0
    return Store(folder / "store")


def filters(store: Store, never: Sequence[tuple[str, str]] = (), **options: Any) -> Filters:
    limits = Limits(
        **(
            {"min_log_probability": -9.0, "min_cosine": 0.5, "min_clicks": 4, "min_click_share": 0.01}
            | options.pop("limits", {})
        )
    )
    return Filters(store, limits, ["brand"], never, **options)


def reasons(checker: Filters, query: str, *texts: str) -> list[str]:
    (found,) = checker([query], [[(text, -float(i)) for i, text in enumerate(texts)]])
    assert [one.text for one in found] == list(texts)
    return [one.reason for one in found]


def test_each_filter_gives_its_reason(store: Store) -> None:
    checker = filters(store, [("red bucket", "red pail small")])
    assert reasons(
        checker, "red bucket", "red pail", "Red  Bucket!", "RED-PAIL", "", " ?! ", "red pail small", "blue pail"
    ) == [
        "",
        "same: has the words of the query",
        "twice: is a better candidate already",
        "empty: has no words",
        "empty: has no words",
        "never: the list forbids the pair",
        "no items: its words match no other titles than those of the query",
    ]
    # Fewer words and another order say nothing new, and more words match fewer titles.
    found = reasons(checker, "red pail", "pail red", "red", "red bucket pail", "red pail or bucket")
    assert [text.partition(":")[0] for text in found] == ["no words", "no words", "no items", "no items"]


def test_unlikely_rewrites(store: Store) -> None:
    checker = filters(store, limits={"min_log_probability": -0.5})
    assert reasons(checker, "drill", "power", "screwdriver") == ["", "unlikely: log-probability below -0.5"]


def test_numbers_sizes_and_brands_stay(store: Store) -> None:
    checker = filters(store)
    assert reasons(checker, "drill 12v", "power drill", "power 12 v screwdriver", "power screwdriver 12v") == [
        "number: loses 12",
        "no items: its words match no other titles than those of the query",
        "",
    ]
    assert reasons(checker, "screwdriver", "12v power screwdriver") == ["number: 12 is not in the query"]
    assert reasons(checker, "acme power drill", "power drill", "ACME cordless drill") == ["brand: loses acme", ""]
    assert reasons(checker, "bolt tools drill", "power tools", "bolt tools screwdriver") == [
        "brand: loses bolt tools",
        "",
    ]
    # A part of a brand is not a brand.
    assert reasons(checker, "bolt", "drill") == [""]
    assert reasons(checker, "large bucket", "small pail", "large pail") == ["size: loses large", ""]


def test_brands_and_sizes_come_only_where_a_word_is_unknown(store: Store) -> None:
    checker = filters(store)
    assert reasons(checker, "cordless drill", "acme drill") == ["brand: acme is not in the query"]
    assert reasons(checker, "bucket", "small pail") == ["size: small is not in the query"]
    assert reasons(checker, "akme cordless drill", "acme cordless drill") == [""]


def test_drift_by_clicks(store: Store) -> None:
    checker = filters(store)
    # The log has six clicks for "cordless drill", one of them on item 7.
    assert reasons(checker, "Cordless drill", "power drill", "drill stand", "red pail", "drill bits") == [
        "", "", "drift: matches 0% of the query's 6 clicks", "drift: matches 0% of the query's 6 clicks",
    ]  # fmt: skip
    assert reasons(filters(store, limits={"min_click_share": 0.2}), "Cordless drill", "power drill", "drill stand") == [
        "", "drift: matches 17% of the query's 6 clicks",
    ]  # fmt: skip
    assert reasons(filters(store, limits={"min_clicks": 7}), "Cordless drill", "drill bits") == [""]
    assert reasons(filters(store, limits={"min_click_share": 0.0}), "Cordless drill", "red pail") == [""]
    assert reasons(checker, "red bucket", "power drill") == [""], "two clicks say too little"


def test_cosine(store: Store) -> None:
    asked = []

    def embed(texts: Sequence[str]) -> np.ndarray:
        asked.append(list(texts))
        angles = np.array([0.2 * len(text) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)

    checker = filters(store, embed=embed)
    (first, second) = checker(["drill", "red"], [[("power", -1.0), ("screwdriver", -2.0), ("zzz", -3.0)], []])
    assert [one.reason for one in first] == ["", "meaning: cosine below 0.5", first[2].reason] and second == []
    assert first[0].cosine == pytest.approx(1) and first[1].cosine == pytest.approx(np.cos(1.2))
    assert first[2].cosine is None and asked == [["drill", "power", "screwdriver"]]
    assert checker(["drill"], [[]]) == [[]]


def test_title_index_against_sets() -> None:
    rng = np.random.default_rng(2)
    titles = [" ".join(rng.choice(list("abcdefgh"), rng.integers(0, 6))) for _ in range(200)]
    index = TitleIndex(titles)
    for _ in range(100):
        words = list(rng.choice(list("abcdefgz"), rng.integers(0, 6)))
        missing = [len(set(words) - set(title.split())) for title in titles]
        for may_miss in (False, True):
            most = int(may_miss and len(set(words)) > 1)
            expected = [i for i, count in enumerate(missing) if words and count <= most]
            assert index.matches(words, may_miss).tolist() == expected
    assert index.knows("a") and not index.knows("z")
    assert TitleIndex([]).matches(["a"]).tolist() == []


def test_frequent_queries(store: Store) -> None:
    assert list(frequent_queries(store, 10)) == ["Cordless drill", "red bucket", "acme drill 12v"]
    assert list(frequent_queries(store, 1)) == ["Cordless drill"] and value_names(store) == ["brand"]
    with pytest.raises(UsageError, match=r"no feature or filter 'colour' with values, expected some of: brand"):
        Filters(store, Limits(-9, 0, 1, 0), ["colour"], ())


def words_of(found: dict[str, list[tuple[str, float]]]) -> Callable[..., list[list[tuple[str, float]]]]:
    """A rewriter that knows some queries."""
    return lambda texts, n, seed: [found.get(text, [])[:n] for text in texts]


FOUND = {
    "Cordless drill": [("power drill", -0.5), ("drill stand", -1.0), ("red pail", -1.5), ("power stand", -2.0)],
    "red bucket": [("red pail", -0.25), ("blue pail", -3.0)],
}


def test_the_table_has_what_the_lists_and_filters_leave(store: Store, tmp_path: Path) -> None:
    always = {"red bucket": ["Red PAIL", "tub"], "new query": ["pail"], "cordless drill": []}
    table = rewrite.Table(words_of(FOUND), filters(store), always, n=2, candidates=4, seed=0)
    counts = table.write(["red bucket", "Cordless drill", "new query", "手机"], tmp_path)
    assert counts == {"queries": 4, "rewritten": 3, "rewrites": 5, "dropped": {"no items": 1, "drift": 1}}
    lines = gzip.decompress((tmp_path / rewrite.LIST).read_bytes()).decode().splitlines()
    assert lines == [
        "red bucket\tRed PAIL\t0.0000\t\tlist",
        "red bucket\ttub\t0.0000\t\tlist",
        "Cordless drill\tpower drill\t-0.5000\t\tmodel",
        "Cordless drill\tdrill stand\t-1.0000\t\tmodel",
        "new query\tpail\t0.0000\t\tlist",
    ]
    shown = rewrite.explanation("Cordless drill", *(table.candidates(["Cordless drill"])), n=2)
    assert shown.splitlines()[1:] == [
        "  log-prob  cosine  new titles  rewrite",
        "    -0.500                   2  power drill  [kept]",
        "    -1.000                   1  drill stand  [kept]",
        "    -1.500                   2  red pail  [drift: matches 0% of the query's 6 clicks]",
        "    -2.000                   1  power stand  [not among the 2]",
    ]
    (listed,) = table.candidates(["red bucket"])
    assert "  Red PAIL  [kept: of the list]" in rewrite.explanation("red bucket", listed, 2)
    assert "writes nothing" in rewrite.explanation("\x1b[2J", [], 2) and "\x1b" not in rewrite.explanation(
        "\x1b", [], 2
    )


def test_batches_give_the_same_table(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    for batch in (1, 2, 1024):
        monkeypatch.setattr(rewrite, "_BATCH", batch)
        (tmp_path / str(batch)).mkdir()
        table = rewrite.Table(words_of(FOUND), filters(store), {}, 3, 10, 0)
        table.write(["red bucket", "Cordless drill", "new query"], tmp_path / str(batch))
        written.append([path.read_bytes() for path in sorted((tmp_path / str(batch)).iterdir())])
    assert written[0] == written[1] == written[2] and len(written[0]) == 2


def test_lists_of_pairs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("\ufeffred bucket\tpail\n\n Red BUCKET \ttub \r\nsofa\tcouch\n", encoding="utf-8")
    pairs = rewrite.read_pairs(str(path), "always")
    assert pairs == [("red bucket", "pail"), ("Red BUCKET", "tub"), ("sofa", "couch")]
    assert rewrite.read_pairs(None, "never") == []
    for line in ("red bucket", "a\tb\tc", "\tpail", "red\t!!"):
        path.write_text(f"sofa\tcouch\n{line}\n")
        with pytest.raises(CommandError, match=r"pairs.tsv, line 2: expected query<TAB>rewrite, both with words"):
            rewrite.read_pairs(str(path), "never")
    path.write_bytes(b"sofa\tcou\xffch\n")
    with pytest.raises(CommandError, match="is not UTF-8 text"):
        rewrite.read_pairs(str(path), "never")
    with pytest.raises(CommandError, match=r"--never=.*: cannot be read: No such file"):
        rewrite.read_pairs(str(tmp_path / "none.tsv"), "never")


def test_keys() -> None:
    assert key_of(" Red-Shoes, 1,000 ") == "red shoes 1000" and key_of("?! ") == ""
