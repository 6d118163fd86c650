"""Properties of every text: all interfaces give the same tokens, and the implementation in reference.py agrees."""

from __future__ import annotations

import io
import itertools
import json
import os
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import reference
from golden import read_golden

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import tensorflow as tf
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dpsr_common.command_line import main
from dpsr_tokenizer import Tokenizer, TokenizerConfig, Vocabulary, VocabularyBuilder
from dpsr_tokenizer.tf_ops import VocabularyTable

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
EVERY_KIND = TokenizerConfig(word_bigrams=True, markers=True)
WORDS = TokenizerConfig(letter_trigrams=False, char_bigrams=False, number_parts=False)

# Code points at random are mostly unassigned: these are the ones that rules are about.
characters = st.one_of(
    st.sampled_from("aB zé#<>.,/-0123456789手机のกิ한Дß\u2044½①㎜ﬁＡ１，\u3000\u200b\u0301\u0323\0😀\u3099カｶﾞ٣٫"),
    st.sampled_from([chr(c) for first, last, _ in reference.UNSPACED for c in (first - 1, first, last, last + 1)]),
    st.characters(codec="utf-8"),
)
texts = st.text(characters, max_size=40)
dirty = st.lists(st.one_of(texts.map(str.encode), st.binary(max_size=4)), max_size=6).map(b"".join)
configs = st.fixed_dictionaries({name: st.booleans() for name in reference.DEFAULTS})


@pytest.fixture(scope="module")
def shells(tmp_path_factory):
    """Five ways to turn texts into ids, list of bytes -> list of lists, with a vocabulary of the golden texts."""
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.dpsr"
    builder = VocabularyBuilder(EVERY_KIND)
    builder.add([case.text for case in read_golden()])
    builder.write(path, min_count=2, num_oov_buckets=1000)
    vocabulary, table = Vocabulary(path), VocabularyTable(path)
    ids_of = {vocabulary.token(i): i for i in range(len(vocabulary))}

    def batch(texts):
        values, splits = vocabulary.encode_batch(texts)
        return [values[begin:end].tolist() for begin, end in itertools.pairwise(splits)]

    def command(texts):
        stdin = SimpleNamespace(buffer=io.BytesIO(b"".join(text + b"\n" for text in texts)), isatty=lambda: False)
        stdout = SimpleNamespace(buffer=io.BytesIO())
        with mock.patch("sys.stdin", stdin), mock.patch("sys.stdout", stdout):
            assert main(["tokenize", f"--vocabulary={path}", "--ids", "--json"]) == 0
        return [json.loads(line) for line in stdout.buffer.getvalue().splitlines()]

    return SimpleNamespace(
        one_by_one=lambda texts: [vocabulary.encode(text).tolist() for text in texts],
        batch=batch,
        op=lambda texts: table.tokenize(tf.constant(texts, tf.string, [len(texts)])).to_list(),
        command=command,
        # Without the buckets, whose hash is the core's own: -1 for each.
        tokens=lambda texts: [[ids_of.get(token, -1) for token in Tokenizer(EVERY_KIND).tokenize(t)] for t in texts],
        known=lambda rows: [[i if i < len(vocabulary) else -1 for i in row] for row in rows],
    )


def assert_same(shells, texts):
    expected = shells.one_by_one(texts)
    assert shells.batch(texts) == expected
    assert shells.op(texts) == expected
    assert shells.command(texts) == expected
    assert shells.known(expected) == shells.tokens(texts)


@given(st.lists(dirty.map(lambda text: text.replace(b"\n", b" ")), max_size=5))
def test_shells_are_identical(shells, texts):
    assert_same(shells, texts)


@given(dirty, configs)
@settings(max_examples=500)
def test_second_reading_of_the_rules(text, switches):
    assume(reference.is_known(reference.decode(text)))
    assert Tokenizer(TokenizerConfig(**switches)).tokenize(text) == reference.tokenize(text, **switches)


def multicpr() -> list[bytes]:
    files = ("train.query.txt", "dev.query.txt")
    lines = [line for name in files for line in (DATA / "multicpr_ecom" / name).read_bytes().splitlines()]
    return [line.split(b"\t", 1)[1] for line in lines]


def homedepot() -> list[bytes]:
    files = sorted((DATA / "homedepot").glob("*.tsv"))
    return sorted({field for path in files for line in path.read_bytes().splitlines() for field in line.split(b"\t")})


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "read", "at_least"), [("multicpr_ecom", multicpr, 101_000), ("homedepot", homedepot, 60_000)]
)
def test_shells_and_rules_on_real_texts(shells, folder, read, at_least):
    if not (DATA / folder).is_dir():
        pytest.skip(f"no {DATA / folder}")
    texts = read()
    assert len(texts) >= at_least
    assert_same(shells, texts)
    tokenizer = Tokenizer(EVERY_KIND)
    for text in texts[::4]:  # the reference is slow
        if reference.is_known(reference.decode(text)):
            assert tokenizer.tokenize(text) == reference.tokenize(text, word_bigrams=True, markers=True)


@given(st.lists(dirty, max_size=6), st.integers(0, 6))
def test_a_batch_may_be_split_anywhere(shells, texts, at):
    whole = shells.batch(texts)
    assert shells.batch(texts[:at]) + shells.batch(texts[at:]) == whole
    assert shells.op(texts[:at]) + shells.op(texts[at:]) == whole


@given(dirty, configs)
def test_tokens_are_clean(text, switches):
    """Kinds can be told apart: only trigrams begin with '#', and only word bigrams contain a space."""
    tokens = Tokenizer(TokenizerConfig(**switches)).tokenize(text)
    for token in tokens:
        assert token
        token.encode()
        assert "|" not in token and "\0" not in token
    assert switches["letter_trigrams"] or not any("#" in token for token in tokens)
    assert switches["word_bigrams"] or not any(" " in token for token in tokens)
    assert switches["markers"] or not any("<" in token for token in tokens)
    if switches["markers"]:
        assert (tokens[0], tokens[-1]) == ("<s>", "</s>")


@given(dirty)
def test_trigrams_are_no_words(text):
    words = Tokenizer(TokenizerConfig(letter_trigrams=False, word_bigrams=True, markers=True)).tokenize(text)
    trigrams = Tokenizer(TokenizerConfig(word_unigrams=False, char_unigrams=False, char_bigrams=False)).tokenize(text)
    assert not set(words) & set(trigrams)


@given(dirty)
def test_switches_are_independent(text):
    """The tokens of each kind alone are together the tokens of all kinds; number parts come with the unigrams."""
    kinds = ["word_unigrams", "word_bigrams", "letter_trigrams", "char_unigrams", "char_bigrams"]
    off = dict.fromkeys(kinds, False)
    alone = [Tokenizer(TokenizerConfig(**{**off, kind: True})).tokenize(text) for kind in kinds]
    together = Tokenizer(TokenizerConfig(**dict.fromkeys(kinds, True))).tokenize(text)
    assert sorted(itertools.chain.from_iterable(alone)) == sorted(together)


@given(dirty, dirty)
def test_texts_side_by_side(a, b):
    """Joining two texts with a separator keeps their tokens, and only adds bigrams of words."""
    tokenizer = Tokenizer(TokenizerConfig())
    assert tokenizer.tokenize(a + b" | " + b) == tokenizer.tokenize(a) + tokenizer.tokenize(b)


@given(texts)
def test_words_tokenize_to_themselves(text):
    tokenizer = Tokenizer(WORDS)
    words = [token for token in tokenizer.tokenize(text) if tokenizer.tokenize(token)]
    assert tokenizer.tokenize(" ".join(words)) == words


@given(texts, st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"]))
def test_normal_forms_are_one(text, form):
    assume(reference.is_known(text))
    tokenizer = Tokenizer(EVERY_KIND)
    assert tokenizer.tokenize(unicodedata.normalize(form, text)) == tokenizer.tokenize(text)


@given(texts)
def test_case_is_folded(text):
    """Case folding is what the rules say; upper() and lower() differ from it in places (U+0131, final sigma)."""
    assume(reference.is_known(text))
    tokenizer = Tokenizer(EVERY_KIND)
    tokens = tokenizer.tokenize(text)
    assert tokenizer.tokenize(text.casefold()) == tokens
    if text.upper().casefold() == text.casefold():
        assert tokenizer.tokenize(text.upper()) == tokens


@given(st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E)))
def test_full_width_is_half_width(text):
    wide = "".join("\u3000" if c == " " else chr(ord(c) + 0xFEE0) for c in text)
    assert Tokenizer(EVERY_KIND).tokenize(wide) == Tokenizer(EVERY_KIND).tokenize(text)


@given(texts, st.sampled_from("\u00ad\u200b\u200d\u2060\ufe0f\ufeff"), st.integers(0, 40))
def test_ignorable_code_points_change_nothing(text, ignorable, at):
    tokenizer = Tokenizer(EVERY_KIND)
    assert tokenizer.tokenize(text[:at] + ignorable + text[at:]) == tokenizer.tokenize(text)


@pytest.mark.parametrize("unit", ["a", "手", "é", "1,", "\u0301\u0323", "a1", "\uff76\uff9e", "\xff"])
def test_a_megabyte(shells, unit):
    text = unit.encode("latin-1" if unit == "\xff" else "utf-8")
    text *= 2**20 // len(text)
    (ids,) = shells.one_by_one([text])
    np.testing.assert_array_equal(shells.op([text])[0], ids)
