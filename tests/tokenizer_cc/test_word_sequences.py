from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import tensorflow as tf

from dpsr_common.packed_file import FormatError
from dpsr_tokenizer import Tokenizer, TokenizerConfig, Vocabulary, VocabularyBuilder, WordSequences
from dpsr_tokenizer.tf_ops import VocabularyTable, _ops, join_words

TEXTS = ["Red  SHOES, 3.5mm", "手机壳 red zebra", "", "\ud800 !?", "café iPhone手机 1,000 red shoes red shoes red"]


def write(path: Path, config: TokenizerConfig, buckets: int = 0) -> Path:
    builder = VocabularyBuilder(config)
    builder.add(["red shoes 3.5mm 手机壳", "red shoes", "red", "iphone 1000"])
    builder.write(path, num_oov_buckets=buckets)
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("words") / "vocabulary.words.dpsr", WordSequences.config())


@pytest.fixture(scope="module")
def sequences(path: Path) -> WordSequences:
    # The vocabulary must live as long as the sequences do.
    return WordSequences(Vocabulary(path))


def test_ids_are_those_of_the_vocabulary(path: Path, sequences: WordSequences) -> None:
    vocabulary = Vocabulary(path)
    assert len(sequences) == 4 + len(vocabulary)
    tokenizer = Tokenizer(WordSequences.config())
    known = {vocabulary.token(i): 4 + i for i in range(len(vocabulary))}
    ids = sequences.encode(TEXTS, max_words=6)
    assert ids.dtype == np.int32 and ids.shape == (5, 6)
    for text, row in zip(TEXTS, ids.tolist(), strict=True):
        expected = [known.get(word, WordSequences.UNKNOWN) for word in tokenizer.tokenize(text)][:6]
        assert row == expected + [WordSequences.PADDING] * (6 - len(expected))
    assert WordSequences.UNKNOWN in ids


def test_an_end_follows_the_last_word(sequences: WordSequences) -> None:
    ids = sequences.encode(TEXTS, max_words=4, ends=True)
    assert (np.sum(ids == WordSequences.END, axis=1) == 1).all()
    plain = sequences.encode(TEXTS, max_words=3)
    for row, without in zip(ids, plain, strict=True):
        words = without[without != 0]
        np.testing.assert_array_equal(row[: len(words) + 1], [*words, WordSequences.END])


def test_arrow_data_and_lists_give_the_same(sequences: WordSequences) -> None:
    texts = [text for text in TEXTS if "\ud800" not in text]
    for array in (pa.array(texts), pa.array(texts, pa.large_string())):
        np.testing.assert_array_equal(sequences.encode(array, max_words=5), sequences.encode(texts, max_words=5))
        assert WordSequences.normal(array) == WordSequences.normal(texts)


def test_texts_of_ids_give_the_words_back(sequences: WordSequences) -> None:
    texts = sequences.texts()
    assert texts[:4] == [""] * 4 and " red" in texts and "手" in texts
    words = ["red shoes", "手机壳", "iphone手机壳 red"]
    ids = sequences.encode(words, max_words=8, ends=True)
    joined = join_words(tf.constant(texts), ids)
    assert [text.decode() for text in joined.numpy()] == words
    assert join_words(tf.constant(texts), tf.zeros([2, 3, 4], tf.int32)).numpy().tolist() == [[b""] * 3] * 2


def test_pieces_of_the_vocabulary_are_those_of_its_words(sequences: WordSequences) -> None:
    table = sequences.pieces_of_vocabulary(max_pieces=5, num_pieces=1000)
    assert table.shape == (len(sequences), 5) and not table[:4].any()
    words = [text.strip() for text in sequences.texts()[4:]]
    np.testing.assert_array_equal(
        table[4:], sequences.pieces(words, max_words=1, max_pieces=5, num_pieces=1000)[:, 0, :]
    )
    assert table[4:][table[4:] > 0].min() >= 1 and table.max() < 1000


def test_the_op_gives_what_the_module_gives(path: Path, sequences: WordSequences) -> None:
    texts = [text.encode("utf-8", "surrogatepass") for text in TEXTS] * 50
    words, pieces = VocabularyTable(path).word_sequences(texts, 6, max_pieces=4, num_pieces=99)
    np.testing.assert_array_equal(words, sequences.encode(texts, max_words=6))
    np.testing.assert_array_equal(pieces, sequences.pieces(texts, max_words=6, max_pieces=4, num_pieces=99))
    words, pieces = VocabularyTable(path).word_sequences(tf.zeros([0], tf.string), 6)
    assert words.shape == (0, 6) and pieces.shape == (0, 6, 12)


def test_the_op_has_static_shapes(path: Path) -> None:
    with tf.Graph().as_default():
        table = VocabularyTable(path)
        words, pieces = table.word_sequences(tf.compat.v1.placeholder(tf.string, [None]), 7, 3)
        assert words.shape.as_list() == [None, 7] and pieces.shape.as_list() == [None, 7, 3]
        words, _ = table.word_sequences(tf.compat.v1.placeholder(tf.string), 7)
        assert words.shape.as_list() == [None, 7]
        with pytest.raises(ValueError, match="rank"):
            table.word_sequences(tf.compat.v1.placeholder(tf.string, [2, 2]), 7)


def test_bad_arguments_are_refused(path: Path, sequences: WordSequences) -> None:
    table = VocabularyTable(path)
    handle = table.resource_handle
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"text has shape \[2,2\], expected a vector"):
        _ops.dpsr_word_sequences(handle, [["a", "b"]] * 2, max_words=3, max_pieces=3, num_pieces=9)
    with pytest.raises(tf.errors.InvalidArgumentError, match="max_words is 1025, expected at most 1024"):
        table.word_sequences(["a"], 1025)
    with pytest.raises(tf.errors.InvalidArgumentError, match="max_pieces is 257, expected at most 256"):
        table.word_sequences(["a"], 1, 257)
    with pytest.raises(ValueError, match="max_words is 0, expected 1 to 1024"):
        sequences.encode(["a"], max_words=0)
    with pytest.raises(ValueError, match="num_pieces is 1, expected 2 to"):
        sequences.pieces(["a"], max_words=1, num_pieces=1)
    with pytest.raises(TypeError, match="got one text"):
        sequences.encode("a", max_words=1)


@pytest.mark.parametrize(
    ("config", "buckets", "reason"),
    [(TokenizerConfig(), 0, "other tokens than words"), (WordSequences.config(), 3, "3 hash buckets, expected none")],
)
def test_other_vocabularies_are_refused(tmp_path: Path, config: TokenizerConfig, buckets: int, reason: str) -> None:
    path = write(tmp_path / "vocabulary.dpsr", config, buckets)
    with pytest.raises(FormatError, match=reason):
        WordSequences(Vocabulary(path))
    with pytest.raises(tf.errors.FailedPreconditionError, match=reason):
        VocabularyTable(path).word_sequences(["a"], 3)
