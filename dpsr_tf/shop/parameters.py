"""The parameters of the generated shop."""

from __future__ import annotations

import dataclasses

from dpsr_common.typed_config import option

# The syllables of a language do not give more names than these.
_MOST_BRANDS, _MOST_SHOPS = 200, 5_000
# The types that lexicon.yaml lists one by one, and those with the types of its families.
_FEWEST_TYPES, _MOST_TYPES = 58, 560


@dataclasses.dataclass(frozen=True)
class Parameters:
    """The parameters of a shop. The first five also have flags. truth.json records all of them."""

    seed: int = option(1, "seed of all random numbers; another seed gives another shop", 0, 2**63 - 1)
    items: int = option(3_000, "number of items, English and Chinese together", 200, 5_000_000)
    users: int = option(500, "number of users, English and Chinese together", 10, 20_000_000)
    interactions: int = option(
        30_000, "number of clicks in the log; the log has about seven times as many rows", 100, 1_000_000_000
    )
    types: int = option(
        _FEWEST_TYPES, "number of types of product, English and Chinese together", _FEWEST_TYPES, _MOST_TYPES
    )
    chinese_share: float = option(1 / 3, "share of the items and of the users that are Chinese", 0.1, 0.9)
    days: int = option(60, "number of days that the log covers", 1, 3650)
    requests_per_session: float = option(1.6, "average number of queries in a session, which has at most 5", 1, 4)
    list_length: int = option(8, "largest number of items shown for a request", 2, 100)
    popularity_exponent: float = option(0.8, "Zipf exponent of item popularity", 0, 2)
    query_exponent: float = option(0.8, "Zipf exponent of query frequency", 0, 2)
    activity_exponent: float = option(0.5, "Zipf exponent of user activity", 0, 2)
    position_exponent: float = option(
        0.7, "position bias: users look at the item at position p with probability p ** -position_exponent", 0, 3
    )
    shuffled_share: float = option(0.1, "share of requests whose items are shown in random order", 0, 1)
    sorted_share: float = option(
        0.0, "share of requests whose items are shown in the order of popularity, without chance", 0, 1
    )
    stray_share: float = option(
        0.15, "share of shown items that share words or the category with the query but do not answer it", 0, 0.9
    )
    noise: float = option(
        0.04, "click probability of an item that the user looks at and that does not answer the query", 0, 0.5
    )
    click_level: float = option(
        -2.5, "log odds of a click on an answer that matches neither the user's taste nor the intent", -4, 4
    )
    taste: float = option(1.0, "how strongly the user's profile decides about clicks; 0 is not at all", 0, 5)
    history: float = option(
        2.5, "how strongly the latent taste, which only the history shows, decides about clicks; 0 is not at all", 0, 5
    )
    intent: float = option(1.0, "how strongly the intent of the session decides about clicks; 0 is not at all", 0, 5)
    loyalty: float = option(0.75, "share of sessions in one of the user's two favourite categories", 0, 1)
    cart_share: float = option(0.25, "share of clicks on answers after which the item is put into the cart", 0, 1)
    order_share: float = option(0.5, "share of carts that are ordered", 0, 1)
    typo_share: float = option(0.04, "share of requests whose query is misspelt", 0, 1)
    misspellings: int = option(4, "largest number of ways in which a query is misspelt", 1, 100)
    shops: int = option(80, "number of shops, English and Chinese together", 30, _MOST_SHOPS)
    invented_brands: int = option(
        0, "number of invented brands in each category, beside those of the lexicon", 0, _MOST_BRANDS
    )
    shared_brands: int = option(
        0, "number of a category's invented brands that also belong to the next category", 0, _MOST_BRANDS
    )
    homonyms: int = option(
        0, "number of English query words that are synonyms of two types in different categories", 0, 12
    )
    titled_synonyms: float = option(
        0.0, "share of titles that name the item's type by one of the type's synonyms", 0, 0.5
    )
    rare_synonyms: float = option(
        0.0, "share of the words of types' synonyms that no query of the log holds, but judged queries do", 0, 1
    )
    unasked_synonyms: float = option(
        0.0, "chance that no query of the log holds a type's synonym, even if it holds its words for other types", 0, 1
    )
    held_out_share: float = option(
        0.1, "share of meanings that the log never asks for; half of them are judged in dev, half in test", 0.01, 0.5
    )
    judged_queries: int = option(
        300, "largest number of queries in each of judgments.dev.tsv and judgments.test.tsv", 10, 10**6
    )
    max_judged_items: int = option(50, "largest number of relevant items listed for a judged query", 1, 10_000)
    personal_judgments: int = option(
        1_000, "number of purchases after the end of the log, in judgments.personal.tsv", 10, 10**5
    )
    labelled_pairs: int = option(3_000, "number of pairs with a human grade, in labels.parquet", 10, 10**6)
    label_noise: float = option(0.1, "share of human grades that differ by one from the true grade", 0, 1)

    def problem(self) -> str | None:
        """Describes values that are allowed one by one but not together; None if there are none."""
        if self.days == 1 and self.interactions > 10_000_000:
            return f"interactions is {self.interactions} and days 1, expected 2 days or more for over 10000000 clicks"
        if self.shared_brands > self.invented_brands:
            return (
                f"shared_brands is {self.shared_brands}, expected at most invented_brands, {self.invented_brands}: "
                f"shared brands are some of the invented ones"
            )
        return None
