"""Other forms of words, such as plurals, found in a vocabulary without a dictionary.

Two words are forms of one another if they begin alike and their endings take turns in many other words, too: in English
titles "" and "s" do so in hundreds of words, "e" and "ing" in dozens. The endings of "white" and "while" do not. So it
works for languages that inflect words at their ends, and does nothing for the others.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

# Number of letters that two forms share at least, and that follow them at most.
_STEM, _ENDING = 3, 3
# Number of pairs of words in which two endings must take turns, and the number from which on a form is drawn in one of
# two cases.
_FEWEST_PAIRS, _HALF = 10, 100


class WordForms:
    """The forms of the words of a vocabulary.

    Example:
        forms = WordForms(["lamp", "lamps", "door", "doors", ...])
        forms.of("lamp")  # [("lamps", 0.8)]
    """

    def __init__(self, words: Iterable[str]):
        """Finds the forms of `words`, which are distinct. Other than runs of letters they are ignored."""
        of_stem: dict[str, list[str]] = {}
        for word in words:
            if word.isalpha():
                for length in range(max(_STEM, len(word) - _ENDING), len(word) + 1):
                    of_stem.setdefault(word[:length], []).append(word[length:])
        count: collections.Counter[tuple[str, str]] = collections.Counter()
        for endings in of_stem.values():
            count.update(pair for pair in itertools.permutations(endings, 2) if pair[0][:1] != pair[1][:1])
        self._forms: dict[str, list[tuple[str, int]]] = {}
        for stem, endings in of_stem.items():
            for one, other in itertools.permutations(endings, 2):
                if one[:1] != other[:1] and count[one, other] >= _FEWEST_PAIRS:
                    self._forms.setdefault(stem + one, []).append((stem + other, count[one, other]))

    def of(self, word: str) -> list[tuple[str, float]]:
        """Returns the forms of a word, each with a share. The more common their endings are, the closer the sum of the
        shares is to 1.
        """
        forms = self._forms.get(word, [])
        total = _HALF + sum(count for _, count in forms)
        return [(form, count / total) for form, count in forms]

    def replaced(self, texts: Sequence[bytes], rate: float, random: np.random.Generator) -> list[bytes]:
        """Replaces words by other forms.

        Args:
            texts: words in UTF-8, separated by spaces.
            rate: probability with which a word is replaced, if the shares of its forms sum to 1.
            random: draws are from this stream.

        Returns:
            The texts with other words.
        """
        chosen = []
        for text in texts:
            words = text.split(b" ")
            draws = random.random(len(words))
            for place in np.flatnonzero(draws < rate).tolist():
                draw = draws[place] / rate
                for form, share in self.of(words[place].decode("utf-8", "replace")):
                    draw -= share
                    if draw < 0:
                        words[place] = form.encode()
                        break
            chosen.append(b" ".join(words))
        return chosen
