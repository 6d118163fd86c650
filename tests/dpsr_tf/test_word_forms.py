"""dpsr_tf/data/word_forms.py: forms of words from endings alone, and texts with other forms."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from dpsr_tf.data.word_forms import WordForms

STEMS = ["lamp", "door", "chair", "table", "window", "garden", "blind", "screw", "hinge", "bracket", "panel", "gutter"]
WORDS = [*STEMS, *(stem + "s" for stem in STEMS), "white", "while", "bolt", "灯泡", "12s", "3/4"]


@pytest.fixture(scope="module")
def forms():
    return WordForms(WORDS)


def test_endings_that_take_turns_often_make_forms(forms):
    ((plural, share),) = forms.of("lamp")
    assert plural == "lamps" and 0 < share < 1
    assert forms.of("doors") == [("door", share)]


@pytest.mark.parametrize("word", ["white", "while", "bolt", "灯泡", "12s", "3/4", "unseen", ""])
def test_other_words_have_no_forms(forms, word):
    assert forms.of(word) == []


def test_common_endings_have_larger_shares():
    many = WordForms(
        [stem + ending for stem in map("stem{}".format, "abcdefghijklmnopqrstuvwxyz") for ending in ("", "s")]
    )
    few = WordForms([stem + ending for stem in map("stem{}".format, "abcdefghijkl") for ending in ("", "s")])
    assert many.of("stema")[0][1] > few.of("stema")[0][1]


def test_words_are_replaced_at_the_rate_and_by_the_seed(forms):
    texts = [b"lamp bolt doors", "灯泡 lamp".encode(), b""] * 2_000
    found = forms.replaced(texts, 0.5, np.random.default_rng(3))
    assert found == forms.replaced(texts, 0.5, np.random.default_rng(3))
    assert found != forms.replaced(texts, 0.5, np.random.default_rng(4))
    words = collections.Counter(word for text in found for word in text.split())
    share = forms.of("lamp")[0][1]
    assert words[b"lamps"] / 4_000 == pytest.approx(0.5 * share, abs=0.03)
    assert words[b"door"] / 2_000 == pytest.approx(0.5 * share, abs=0.03)
    assert words[b"bolt"] == 2_000 and found[2] == b""


def test_a_rate_of_0_changes_nothing(forms):
    assert forms.replaced([b"lamp door"], 0.0, np.random.default_rng(1)) == [b"lamp door"]
