"""The users of the generated shop."""

from __future__ import annotations

import numpy as np

from dpsr_tf.shop.catalogue import USER_CLASSES, Catalogue
from dpsr_tf.shop.lexicon import AGES, GENDERS, POWERS
from dpsr_tf.shop.parameters import Parameters
from dpsr_tf.shop.sampling import random_stream, zipf

# The first and the last year of each entry of AGES.
_AGE_BOUNDS = ((18, 25), (26, 35), (36, 50), (51, 75))


class Users:
    """All users, the English ones first: their profiles, and the latent taste that a profile does not show."""

    def __init__(self, catalogue: Catalogue, parameters: Parameters):
        self._catalogue = catalogue
        self.language = np.repeat([0, 1], catalogue.num_users)
        n = len(self.language)
        rng = random_stream(parameters, "profiles")
        self.profile = rng.integers(0, USER_CLASSES, n)  # int64 [users]: gender, age and power as one number
        rest, self.power = np.divmod(self.profile, len(POWERS))
        self.gender, band = np.divmod(rest, len(AGES))
        low, high = np.array(_AGE_BOUNDS).T
        self.age = rng.integers(low[band], high[band] + 1)  # int64 [users], years
        cities = [len(language.cities) for language in catalogue.languages]
        self.city = rng.integers(0, np.array(cities)[self.language])
        self.activity = np.concatenate(
            [zipf(k, parameters.activity_exponent)[rng.permutation(k)] * k for k in catalogue.num_users]
        )
        rng = random_stream(parameters, "tastes")
        places, styles = int(catalogue.category_place.max()) + 1, max(len(s) for s in catalogue.styles)
        # The brand and the shop that a user prefers, int32 [users, category's place in its language]; -1 is none.
        self.brands, self.shops = np.full((n, places), -1, np.int32), np.full((n, places), -1, np.int32)
        # The word that a user prefers, int32 [users, style's place in its language]; -1 is none.
        self.styles = np.full((n, styles), -1, np.int32)
        # Places of the user's two favourite categories.
        self.categories = np.zeros((n, 2), np.int64)
        for number, language in enumerate(catalogue.languages):
            rows = np.flatnonzero(self.language == number)
            for category in np.flatnonzero(catalogue.category_language == number):
                place = catalogue.category_place[category]
                self.brands[rows, place] = rng.choice(catalogue.category_brands[category], len(rows))
                self.shops[rows, place] = rng.choice(catalogue.category_shops[category], len(rows))
            for place, name in enumerate(catalogue.styles[number]):
                self._draw_styles(rows, place, catalogue.attributes[number][name], rng)
            self.categories[rows] = rng.integers(0, len(language.categories), (len(rows), 2))

    def __len__(self) -> int:
        """Returns the number of users."""
        return len(self.profile)

    def _draw_styles(self, rows: np.ndarray, place: int, codes: np.ndarray, rng: np.random.Generator) -> None:
        """Draws each user's favourite word of a style. Words that the profile dislikes are rare."""
        liking = np.zeros((len(codes), len(GENDERS), len(AGES)))
        for i, code in enumerate(codes):
            who = self._catalogue.words[code]
            if who.gender is not None:
                liking[i] += np.array([[1.0 if g == who.gender else -1.0] for g in GENDERS])
            if who.age is not None:
                liking[i] += np.array([1.0 if a == who.age else -0.5 for a in AGES])
        sums = np.cumsum(np.exp(liking), 0).reshape(len(codes), -1).T  # [gender and age, codes]
        mine = sums[self.profile[rows] // len(POWERS)]
        at = (rng.random((len(rows), 1)) * mine[:, -1:] >= mine).sum(1)
        self.styles[rows, place] = codes[np.minimum(at, len(codes) - 1)]
