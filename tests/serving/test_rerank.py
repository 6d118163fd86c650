"""Re-ranking: collapse, diversity, and the rules of merchandisers."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpsr_common.errors import UsageError
from dpsr_common.packed_file import PackedFile, PackedFileWriter
from dpsr_common.strict_yaml import Section, load_yaml
from dpsr_serving.gateway.catalogue import Catalogue
from dpsr_serving.gateway.rerank import (
    RERANK_KEYS,
    DiversityConfig,
    RerankConfig,
    Reranked,
    Reranker,
    RuleFile,
    diversify,
    find_items,
    normalise,
    read_config,
    read_rules,
)

ShopOf = Callable[..., Catalogue]


def catalogue(
    folder: Path, brands: str, groups: dict[int, int] | None = None, keys: list[str] | None = None
) -> Catalogue:
    """A catalogue in a file. Item i has the id 100 + i, and the brand brands[i] unless that is "-"."""
    names = sorted({*brands} - {"-"})
    path = folder / "catalogue.dpsr"
    with PackedFileWriter(str(path), "catalogue") as file:
        file.add("id", np.arange(100, 100 + len(brands)))
        texts = {"title": ["" for _ in brands], "text.brand": names, "group_text": [str(i) for i in range(10)]}
        for name, column in {**texts, **({"key": keys} if keys else {})}.items():
            data = [text.encode() for text in column]
            file.add(f"{name}.splits", np.cumsum([0, *map(len, data)]))
            file.add(f"{name}.bytes", np.frombuffer(b"".join(data), np.uint8))
        file.add("value.brand", np.array([names.index(brand) + 1 if brand != "-" else 0 for brand in brands], np.int32))
        file.add("value.price", np.arange(len(brands), dtype=np.float32))
        file.add("group", np.array([(groups or {}).get(row, -1) for row in range(len(brands))], np.int32))
        file.add("identifier.hash", np.zeros(0, np.uint64))
        file.add("identifier.row", np.zeros(0, np.int32))
    manifest = {"attributes": [{"name": "brand", "kind": "categorical"}, {"name": "price", "kind": "number"}]}
    return Catalogue(manifest, PackedFile(str(path), "catalogue"))


@pytest.fixture
def shop_of(tmp_path: Path) -> ShopOf:
    return lambda *arguments, **options: catalogue(tmp_path, *arguments, **options)


def rerank(shop: Catalogue, config: dict[str, Any], rules: RuleFile | None = None, **options: Any) -> Reranked:
    n = options.pop("n", shop.num_items)
    ids = np.arange(100, 100 + n)
    scores = options.pop("scores", np.linspace(1, 0.5, n))
    given = {"query": "red shoes", "now": 0.0, **options}
    reranker = Reranker(read_config(Section("rerank", config, RERANK_KEYS), Path()), shop, rules)
    return reranker.apply(ids, shop.rows(ids), scores, **given)


def rules_of(tmp_path: Path, shop: Catalogue, text: str) -> RuleFile:
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    return RuleFile(path, shop)


NOTHING = {"collapse": False}


def test_without_steps_the_list_stays(shop_of: ShopOf) -> None:
    found = rerank(shop_of("AAAB"), NOTHING)
    assert found.ids.tolist() == [100, 101, 102, 103]
    assert found.source.tolist() == found.rows.tolist() == [0, 1, 2, 3]
    assert found.variants.tolist() == [1, 1, 1, 1]
    assert found.reasons(0) == []


def test_an_empty_list_stays_empty(shop_of: ShopOf) -> None:
    config = {"collapse": True, "diversity": {"attributes": ["brand"]}}
    found = rerank(shop_of("AB"), config, n=0)
    assert found.ids.tolist() == [] and found.ids.dtype == np.int64


# Collapse.


def test_the_best_variant_stands_for_its_group(shop_of: ShopOf) -> None:
    shop = shop_of("AAAAA", groups={0: 7, 1: 8, 2: 7, 4: 7})
    found = rerank(shop, {"collapse": True})
    assert found.ids.tolist() == [100, 101, 103]
    assert found.variants.tolist() == [3, 1, 1]
    assert found.reasons(0) == ["stands for 3 variants"]
    assert found.reasons(2) == ["moved from 4 to 3"]


def test_items_that_the_catalogue_does_not_know_do_not_collapse(shop_of: ShopOf) -> None:
    shop = shop_of("AA")
    reranker = Reranker(RerankConfig(), shop)
    found = reranker.apply(np.array([5, 101, 6]), np.array([-1, 1, -1]), np.array([3.0, 2.0, 1.0]), "q", 0)
    assert found.ids.tolist() == [5, 101, 6] and found.variants.tolist() == [1, 1, 1]


# Diversity.


def test_mmr_takes_another_brand_where_scores_are_close(shop_of: ShopOf) -> None:
    shop = shop_of("AAABA")
    config = {"diversity": {"attributes": ["brand"]}}
    assert rerank(shop, config, scores=np.array([1, 0.95, 0.94, 0.9, 0])).ids.tolist() == [100, 103, 101, 102, 104]
    # An item that is much worse does not move up because it is different.
    assert rerank(shop, config, scores=np.array([1, 0.95, 0.94, 0.1, 0])).ids.tolist() == [100, 101, 102, 103, 104]


@pytest.mark.parametrize("strength", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_mmr_is_the_formula(strength: float) -> None:
    """Compares with a slow implementation of the formula."""
    random = np.random.default_rng(7)
    n, window = 40, 5
    scores = np.sort(random.random(n))[::-1]
    values = [
        [2 * brand, *(2 * colour + 1 for colour in random.permutation(6)[:2].tolist())]
        for brand in random.integers(1, 5, n).tolist()
    ]
    config = DiversityConfig(("brand", "colour"), strength=strength, window=window)

    relevance = (scores - scores[-1]) / (scores[0] - scores[-1])
    order: list[int] = []
    left = list(range(n))
    while left:

        def value(result: int) -> float:
            common = {value % 2 for other in order[-window:] for value in {*values[result]} & {*values[other]}}
            return round((1 - strength) * relevance[result] - strength * len(common) / 2, 9)

        order.append(max(left, key=lambda result: (value(result), -result)))
        left.remove(order[-1])
    places = np.repeat(np.arange(n), [len(of_result) for of_result in values])
    assert diversify(config, scores, places, np.concatenate(values)).tolist() == order


@pytest.mark.parametrize("scores", [[1, 1, 1, 1], [np.inf, np.nan, -np.inf, -np.inf], [0.1, 0.9, 0.5, 0.2]])
def test_mmr_bears_scores_that_are_equal_or_no_numbers(shop_of: ShopOf, scores: list[float]) -> None:
    found = rerank(shop_of("AAAB"), {"diversity": {"attributes": ["brand"]}}, scores=np.array(scores))
    assert sorted(found.ids.tolist()) == [100, 101, 102, 103] and found.ids[0] == 100


def test_missing_values_resemble_nothing(shop_of: ShopOf) -> None:
    config = {"diversity": {"attributes": ["brand"], "strength": 1.0}}
    assert rerank(shop_of("----A"), config).ids.tolist() == [100, 101, 102, 103, 104]


def test_window_allows_so_many_of_a_value_among_neighbours(shop_of: ShopOf) -> None:
    config = {"diversity": {"attributes": ["brand"], "method": "window", "window": 4, "most": 2}}
    found = rerank(shop_of("AAAAABBC"), config)
    brands = "".join("AAAAABBC"[row] for row in found.rows)
    assert brands == "AABBAACA"
    assert all(brands[at : at + 4].count("A") <= 2 for at in range(4))


def test_window_without_others_keeps_the_order(shop_of: ShopOf) -> None:
    config = {"diversity": {"attributes": ["brand"], "method": "window", "most": 1}}
    assert rerank(shop_of("AAA"), config).ids.tolist() == [100, 101, 102]


def test_only_the_first_results_change_places(shop_of: ShopOf) -> None:
    config = {"diversity": {"attributes": ["brand"], "strength": 1.0, "size": 3}}
    assert rerank(shop_of("AAABBB"), config).ids.tolist() == [100, 101, 102, 103, 104, 105]
    config["diversity"]["size"] = 4
    assert rerank(shop_of("AAABBB"), config).ids.tolist() == [100, 103, 101, 102, 104, 105]


def config_of(text: str) -> RerankConfig:
    return read_config(
        Section("", load_yaml(text, lines=True), ("rerank",)).section("rerank", RERANK_KEYS), Path("shop")
    )


def test_config() -> None:
    assert config_of("{}") == RerankConfig(collapse=True, diversity=None, rules=None)
    found = config_of("rerank:\n  collapse: false\n  rules: rules.yaml\n  diversity: {attributes: brand, size: 9}\n")
    assert found == RerankConfig(False, DiversityConfig(("brand",), size=9), "shop/rules.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("collapses: true", "line 2: rerank: unknown key 'collapses', allowed: collapse, diversity, rules"),
        ("collapse: 1", "line 2: rerank.collapse: got 1, expected true or false"),
        ("diversity: brand", "rerank.diversity: got 'brand', expected a mapping with the keys attributes, method"),
        ("diversity: {}", "line 2: rerank.diversity.attributes: got None, expected a list of keyword attributes"),
        ("diversity: {attributes: []}", r"got \[\], expected a list of keyword attributes"),
        ("diversity: {attributes: [a, a]}", "expected each attribute once"),
        ("diversity: {attributes: a, method: best}", "got 'best', expected 'mmr' or 'window'"),
        ("diversity: {attributes: a, most: 2}", "most: belongs to the method window"),
        ("diversity: {attributes: a, method: window, strength: 0.5}", "strength: belongs to the method mmr"),
        ("diversity: {attributes: a, strength: 1.5}", "expected a number of at least 0 and at most 1"),
        ("diversity: {attributes: a, window: 1}", "expected an integer of at least 2"),
        ("diversity: {attributes: a, size: 1000}", "expected at most 500"),
    ],
)
def test_wrong_config(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        config_of(f"rerank:\n  {text}\n")


# Rules.


def test_pinned_items_take_their_places(shop_of: ShopOf, tmp_path: Path) -> None:
    shop = shop_of("AAAAAA")
    rules = rules_of(tmp_path, shop, "two:\n  pin: [104, 102]\nlater:\n  pin: [105]\n  pin_at: 4\n")
    found = rerank(shop, NOTHING, rules)
    assert found.ids.tolist() == [104, 102, 100, 105, 101, 103]
    assert found.reasons(0) == ["moved from 5 to 1", "two: pinned"]
    assert found.reasons(3) == ["moved from 6 to 4", "later: pinned"]


def test_pins_for_one_place_follow_each_other(shop_of: ShopOf, tmp_path: Path) -> None:
    shop = shop_of("AAAA")
    rules = rules_of(tmp_path, shop, "a:\n  pin: [103]\nb:\n  pin: [102]\nc:\n  pin: [103]\n  pin_at: 4\n")
    assert rerank(shop, NOTHING, rules).ids.tolist() == [103, 102, 100, 101]


def test_a_pin_beyond_the_end_is_last(shop_of: ShopOf, tmp_path: Path) -> None:
    shop = shop_of("AAAA")
    rules = rules_of(tmp_path, shop, "a:\n  pin: [100, 101]\n  pin_at: 90\n")
    assert rerank(shop, NOTHING, rules).ids.tolist() == [102, 103, 100, 101]


def test_a_pinned_item_that_recall_did_not_find_is_added_if_it_matches_the_filters(
    shop_of: ShopOf, tmp_path: Path
) -> None:
    shop = shop_of("AAAB")
    rules = rules_of(tmp_path, shop, "a:\n  pin: [103]\n")
    found = rerank(shop, NOTHING, rules, n=2)
    assert found.ids.tolist() == [103, 100, 101] and found.source.tolist() == [-1, 0, 1]
    assert found.rows.tolist() == [3, 0, 1]
    assert found.reasons(0) == ["not found by recall", "a: pinned"]
    assert rerank(shop, NOTHING, rules, n=2, filters={"brand": ["A"]}).ids.tolist() == [100, 101]
    assert rerank(shop, NOTHING, rules, n=0).ids.tolist() == [103]


def test_a_pinned_variant_stands_for_its_group(shop_of: ShopOf, tmp_path: Path) -> None:
    shop = shop_of("AAAAA", groups={0: 7, 2: 7, 3: 7})
    rules = rules_of(tmp_path, shop, "a:\n  pin: [102]\n  pin_at: 2\n")
    found = rerank(shop, {"collapse": True}, rules)
    assert found.ids.tolist() == [101, 102, 104] and found.variants.tolist() == [1, 3, 1]
    rules = rules_of(tmp_path, shop, "a:\n  pin: [103, 102]\n")
    assert rerank(shop, {"collapse": True}, rules).ids.tolist() == [103, 102, 101, 104]


def test_boost_and_bury_move_items_and_add_up(shop_of: ShopOf, tmp_path: Path) -> None:
    shop = shop_of("AABABA")
    rules = rules_of(tmp_path, shop, "a:\n  boost: {filters: {brand: [B]}, places: 2}\n")
    assert rerank(shop, NOTHING, rules).ids.tolist() == [102, 100, 101, 104, 103, 105]
    rules = rules_of(tmp_path, shop, "a:\n  bury: {items: [100, '101']}\n")
    found = rerank(shop, NOTHING, rules)
    assert found.ids.tolist() == [102, 103, 104, 105, 100, 101]
    assert found.reasons(5) == ["moved from 2 to 6", "a: buried"]
    both = "a:\n  boost: {items: [103], places: 2}\n  bury: {items: [103], places: 1}\n"
    assert rerank(shop, NOTHING, rules_of(tmp_path, shop, both)).ids.tolist() == [100, 101, 103, 102, 104, 105]
    first = f"a:\n  boost: {{items: [103], places: {10**15}}}\n"
    assert rerank(shop, NOTHING, rules_of(tmp_path, shop, first)).ids.tolist() == [103, 100, 101, 102, 104, 105]


def test_rules_come_after_diversity(shop_of: ShopOf, tmp_path: Path) -> None:
    shop = shop_of("AAB")
    rules = rules_of(tmp_path, shop, "a:\n  bury: {filters: {brand: [B]}}\n")
    found = rerank(shop, {"diversity": {"attributes": ["brand"], "strength": 1.0}}, rules)
    assert found.ids.tolist() == [100, 101, 102]


@pytest.mark.parametrize(
    ("condition", "query", "applies"),
    [
        ("queries: [red shoes]", "  Red  SHOES ", True),
        ("queries: [red shoes]", "red shoes sale", False),
        ("queries: red shoes", "red shoes", True),
        ("contains: [shoes]", "red shoes sale", True),
        ("contains: [shoes]", "snowshoes", False),
        ("contains: [shoe]", "red shoes", False),
        ("contains: [red shoes]", "cheap red shoes!", True),
        ("contains: [手机]", "红色手机壳", True),
        ("contains: [2 kg]", "sugar 2 kg", True),
        ("contains: [ﬁne]", "FINE sand", True),
        ("queries: [42]", "42", True),
        ("{}", "anything", True),
    ],
)
def test_rules_look_at_the_query(shop_of: ShopOf, tmp_path: Path, condition: str, query: str, applies: bool) -> None:
    text = f"a:\n  pin: [101]\n  {condition}\n" if condition != "{}" else "a:\n  pin: [101]\n"
    rules = rules_of(tmp_path, shop_of("AA"), text)
    assert bool(rules.active(query, 0)) == applies


def test_rules_look_at_the_time(shop_of: ShopOf, tmp_path: Path) -> None:
    text = "a:\n  pin: [101]\n  from: 2026-11-27\n  until: 2026-11-30T08:00+01:00\n"
    rules = rules_of(tmp_path, shop_of("AA"), text)
    begins, ends = 1795737600, 1796022000  # 2026-11-27T00:00Z, 2026-11-30T07:00Z
    assert [bool(rules.active("q", now)) for now in (begins - 1, begins, ends - 1, ends)] == [False, True, True, False]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n", "holds a list, expected rules"),
        ("a: 3\n", "line 1: a: got 3, expected a mapping with the keys queries, contains"),
        ("# words\nb:\n  pin: [100]\na:\n  pins: [100]\n", "line 5: a: unknown key 'pins', allowed: queries, contains"),
        ("a:\n  queries: [x]\n", "line 2: a.pin: the rule does nothing; give it at least one of pin, boost and bury"),
        ("a:\n  pin: 100\n", "a.pin: got 100, expected a list of item ids"),
        ("a:\n  pin: [100]\n  pin_at: 0\n", "a.pin_at: got 0, expected an integer of at least 1"),
        ("a:\n  bury: {items: [100]}\n  pin_at: 2\n", "a.pin_at: got 2, but there is no `pin`"),
        ("a:\n  boost: {}\n", "line 2: a.boost: got {}, which moves no item"),
        (
            "a:\n  boost: {filters: {colour: [red]}}\n",
            "line 2: a.boost.filters: filter 'colour': there is no such attribute; expected one of",
        ),
        ("a:\n  boost: {filters: {price: cheap}}\n", "filter 'price': got 'cheap'; the attribute is a number"),
        ("a:\n  boost: {items: [100], places: -1}\n", "a.boost.places: got -1, expected an integer of at least 1"),
        ("a:\n  pin: [100]\n  queries: ['  ']\n", "a.queries: got .*texts that are not empty"),
        ("a:\n  pin: [100]\n  queries: []\n", "a.queries: got an empty list"),
        ("a:\n  pin: [100]\n  from: soon\n", "a.from: got 'soon', expected a date or time"),
        ("a:\n  pin: [100]\n  from: 2026-02-01\n  until: 2026-01-01\n", "a.until: .*expected a time after `from`"),
        ("a:\n  pin: [100]\na:\n  pin: [101]\n", "'a' is given twice"),
        ("a: [\n", "not valid YAML"),
    ],
)
def test_wrong_rules(shop_of: ShopOf, tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=words) as raised:
        read_rules(path, shop_of("AA"))
    assert str(raised.value).startswith(f"{path}: ")


def test_an_item_that_left_the_shop_is_no_error(
    shop_of: ShopOf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shop = shop_of("AA")
    rules = rules_of(tmp_path, shop, "a:\n  pin: [999, 101]\n")
    assert "a.pin: the index has no item 999" in caplog.text
    assert rerank(shop, NOTHING, rules).ids.tolist() == [101, 100]


def test_rules_are_read_again_when_the_file_changes(
    shop_of: ShopOf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shop = shop_of("AA")
    rules = rules_of(tmp_path, shop, "a:\n  pin: [101]\n")
    rules.refresh()
    assert rules.reloads == {"ok": 0, "refused": 0}

    def replace(text: str) -> None:
        (tmp_path / "new").write_text(text)
        os.replace(tmp_path / "new", tmp_path / "rules.yaml")
        rules.refresh()

    replace("a:\n  bury: {items: [100, 101]}\n")
    assert rules.reloads == {"ok": 1, "refused": 0} and rules.active("q", 0)[0].pin == ()
    with caplog.at_level(logging.ERROR):
        replace("a:\n  pins: [101]\n")
    assert rules.reloads == {"ok": 1, "refused": 1} and rules.active("q", 0)[0].moves
    assert "unknown key 'pins'" in caplog.text
    (tmp_path / "rules.yaml").unlink()
    rules.refresh()
    rules.refresh()  # says it once
    assert rules.reloads == {"ok": 1, "refused": 2} and rules.active("q", 0)
    replace("{}\n")
    assert rules.reloads["ok"] == 2 and not rules.active("q", 0)


def test_no_file_is_an_error_at_the_start(shop_of: ShopOf, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        RuleFile(tmp_path / "rules.yaml", shop_of("A"))


def test_texts_are_compared_without_case_width_and_spaces() -> None:
    assert normalise("  ＲＥＤ\u3000Straße\n") == "red strasse"


def test_items_by_key(shop_of: ShopOf, tmp_path: Path) -> None:
    keys = ["shoe", "boot", "手机", "shoe\0", "a", "sku-17"]
    shop = shop_of("AAAAAA", keys=keys)
    assert shop.rows_of_keys([*keys, "sku-18", "shoes", "", "boot"]).tolist() == [0, 1, 2, 3, 4, 5, -1, -1, -1, 1]
    many = [f"key-{i:03}" for i in range(100)]  # so many that a table is made of the keys
    assert catalogue(tmp_path, "A" * 102, keys=["key-000", *many, "x"]).rows_of_keys(many[::-1]).tolist() == [
        *range(100, 1, -1),
        0,
    ]
    rules = rules_of(tmp_path, shop, "a:\n  pin: [手机, sku-17, gone]\n")
    assert rerank(shop, NOTHING, rules).ids.tolist() == [102, 105, 100, 101, 103, 104]


def test_items_by_id(shop_of: ShopOf) -> None:
    found = find_items(shop_of("AA"), [100, "101", 99, "-1", "1e2", "", str(2**63), 2**70])
    assert found.tolist() == [0, 1, -1, -1, -1, -1, -1, -1]
    shop = shop_of("AA")
    shop.ids = np.array([100, 2**63 - 1])  # 19 digits, as ids that are made of the time have
    assert find_items(shop, [2**63 - 1, str(2**63 - 1), 10**19 - 1]).tolist() == [1, 1, -1]
