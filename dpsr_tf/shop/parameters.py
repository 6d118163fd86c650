"""The parameters of the generated shop."""

from __future__ import annotations

import dataclasses

from dpsr_common.typed_config import option

# A language's syllables give no more names than these.
_MOST_BRANDS, _MOST_SHOPS = 200, 5_000


@dataclasses.dataclass(frozen=True)
class Parameters:
    """What a shop is made from. The first four have flags; the others say how hard it is. truth.json records all."""

    seed: int = option(1, "of everything; another seed gives another shop", 0, 2**63 - 1)
    items: int = option(3_000, "items of both languages", 200, 5_000_000)
    users: int = option(500, "users of both languages", 10, 20_000_000)
    interactions: int = option(30_000, "clicks of the log; the rows are about seven times as many", 100, 1_000_000_000)
    chinese_share: float = option(1 / 3, "share of items and users in the Chinese half", 0.1, 0.9)
    days: int = option(60, "time that the log covers", 1, 3650)
    requests_per_session: float = option(1.6, "queries that a session asks, on average, at most 5 each", 1, 4)
    list_length: int = option(8, "items shown for a request, at most", 2, 100)
    popularity_exponent: float = option(0.8, "Zipf exponent of item popularity", 0, 2)
    query_exponent: float = option(0.8, "Zipf exponent of query frequency", 0, 2)
    activity_exponent: float = option(0.5, "Zipf exponent of user activity", 0, 2)
    position_exponent: float = option(0.7, "the item at position p is looked at with chance p ** -this", 0, 3)
    shuffled_share: float = option(0.1, "share of requests whose list is in random order", 0, 1)
    stray_share: float = option(0.15, "share of shown items that share words or category, but are no answer", 0, 0.9)
    noise: float = option(0.04, "chance of a click on an item that is looked at and is no answer", 0, 0.5)
    click_level: float = option(-2.5, "log odds of a click on an answer that nothing speaks for or against", -4, 4)
    taste: float = option(1.0, "how much the profile decides a click; 0 is nothing", 0, 5)
    history: float = option(2.5, "how much the latent taste decides, which only the history shows; 0 is nothing", 0, 5)
    intent: float = option(1.0, "how much the session's intent decides; 0 is nothing", 0, 5)
    loyalty: float = option(0.75, "share of sessions in one of the user's two favourite categories", 0, 1)
    cart_share: float = option(0.25, "share of clicks on answers that go to the cart", 0, 1)
    order_share: float = option(0.5, "share of carts that are ordered", 0, 1)
    typo_share: float = option(0.04, "share of requests whose query is misspelt", 0, 1)
    misspellings: int = option(4, "ways to misspell a query, at most", 1, 100)
    shops: int = option(80, "shops of both languages", 30, _MOST_SHOPS)
    invented_brands: int = option(0, "brands of each category beside the lexicon's", 0, _MOST_BRANDS)
    shared_brands: int = option(0, "of these, how many are brands of the next category too", 0, _MOST_BRANDS)
    homonyms: int = option(0, "English query words that are synonyms of two types each, of different categories", 0, 12)
    held_out_share: float = option(0.1, "share of meanings that the log never asks for, half dev, half test", 0.01, 0.5)
    judged_queries: int = option(300, "queries in each of judgments.dev.tsv and judgments.test.tsv, at most", 10, 10**6)
    max_judged_items: int = option(50, "relevant items listed for a query, at most", 1, 10_000)
    personal_judgments: int = option(1_000, "purchases after the log's end, judgments.personal.tsv", 10, 10**5)
    labelled_pairs: int = option(3_000, "pairs with a grade of humans, labels.parquet", 10, 10**6)
    label_noise: float = option(0.1, "share of those grades that are one off", 0, 1)

    def problem(self) -> str | None:
        """What is wrong with values that are each allowed but do not go together."""
        if self.days == 1 and self.interactions > 10_000_000:
            return f"interactions is {self.interactions} and days 1, expected 2 days or more for over 10000000 clicks"
        if self.shared_brands > self.invented_brands:
            return (
                f"shared_brands is {self.shared_brands}, expected at most invented_brands, {self.invented_brands}: "
                f"they are some of those"
            )
        return None
