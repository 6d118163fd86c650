from __future__ import annotations

import doctest
import pickle
import re
import subprocess
import sys
import threading
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dpsr_tokenizer
from dpsr_common.packed_file import FormatError
from dpsr_tokenizer import Tokenizer, TokenizerConfig, Vocabulary, VocabularyBuilder

ALL_KINDS = TokenizerConfig(word_bigrams=True)


def write_vocabulary(path, texts, config=None, **limits):
    builder = VocabularyBuilder(config or TokenizerConfig(letter_trigrams=False, char_bigrams=False))
    builder.add(texts)
    builder.write(path, **limits)
    return Vocabulary(path)


def test_import_needs_no_tensorflow():
    code = "import dpsr_tokenizer, sys; dpsr_tokenizer.Tokenizer(); sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_examples_of_the_docstrings():
    names = vars(dpsr_tokenizer)
    examples = 0
    for name in ["", *dpsr_tokenizer.__all__]:
        text = (names[name] if name else dpsr_tokenizer).__doc__ or ""
        test = doctest.DocTestParser().get_doctest(text, dict(names), name or "dpsr_tokenizer", None, None)
        examples += len(test.examples)
        assert doctest.DocTestRunner().run(test).failed == 0
    assert examples >= 3


class TestTokenizer:
    def test_mixed_text(self):
        assert Tokenizer(ALL_KINDS).tokenize("Red Ｓhoe 手机") == [
            *("red", "##re", "#red", "#ed#"),
            *("shoe", "red shoe", "##sh", "#sho", "#hoe", "#oe#"),
            *("手", "机", "手机"),
        ]

    def test_str_and_bytes_agree(self):
        for text in ("", "red", "iPhone手机", "Straße 😀 x"):
            assert Tokenizer().tokenize(text) == Tokenizer().tokenize(text.encode())

    def test_dirty_input_separates(self):
        assert Tokenizer().tokenize(b"a\xffb\x00c") == Tokenizer().tokenize("a b c")
        assert Tokenizer().tokenize("a\ud800b") == Tokenizer().tokenize("a b")

    @pytest.mark.parametrize("text", [None, 3, ["red"], bytearray(b"red")])
    def test_other_types_are_refused(self, text):
        with pytest.raises(TypeError, match="expected str or bytes"):
            Tokenizer().tokenize(text)

    @given(st.text())
    def test_any_text_gives_clean_tokens(self, text):
        for token in Tokenizer(ALL_KINDS).tokenize(text):
            assert token
            token.encode()
            assert not any(
                unicodedata.category(c) in ("Zs", "Cc", "Cs", "Po")
                for c in re.sub("[ .,/]", "", token.strip("#"))  # numbers have . , / within
            )

    @given(st.binary())
    def test_any_bytes_give_tokens(self, data):
        for token in Tokenizer(ALL_KINDS).tokenize(data):
            token.encode()

    @given(st.text(st.characters(codec="utf-8")))
    def test_tokens_tokenize_to_themselves(self, text):
        words = Tokenizer(TokenizerConfig(letter_trigrams=False, char_bigrams=False, number_parts=False))
        tokens = words.tokenize(text)
        assert words.tokenize(" ".join(tokens)) == [t for t in tokens if words.tokenize(t)]

    @given(st.text(st.characters(max_codepoint=127)))
    def test_ascii_is_what_it_looks_like(self, text):
        numbers = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.lower())
        words = re.findall(r"(?:[a-z0-9]|(?<=\d)[.,/](?=\d))+", numbers)
        tokenizer = Tokenizer(TokenizerConfig(letter_trigrams=False, number_parts=False))
        assert tokenizer.tokenize(text) == words
        tokens = []
        for word in words:
            tokens += [word, *(re.findall(r"[a-z]+|[^a-z]+", word) if re.search("[a-z]", word) else [])]
            if re.fullmatch("[a-z]+", word):
                tokens.pop()
        assert Tokenizer(TokenizerConfig(letter_trigrams=False)).tokenize(text) == tokens


class TestTokenizerConfig:
    def test_switches(self):
        config = TokenizerConfig(word_bigrams=True, char_bigrams=False)
        assert config.word_unigrams and config.word_bigrams and config.letter_trigrams and config.char_unigrams
        assert not config.char_bigrams
        assert "word_bigrams=True" in repr(config)
        assert eval(repr(config), vars(dpsr_tokenizer)) == config

    def test_equality(self):
        assert TokenizerConfig() == TokenizerConfig()
        assert hash(TokenizerConfig()) == hash(TokenizerConfig())
        assert TokenizerConfig() != TokenizerConfig(word_unigrams=False)
        assert TokenizerConfig() != "config"

    def test_text_form(self):
        config = TokenizerConfig(letter_trigrams=False)
        assert TokenizerConfig.parse(config.serialize()) == config
        assert pickle.loads(pickle.dumps(config)) == config

    def test_immutable(self):
        with pytest.raises(AttributeError):
            TokenizerConfig().word_bigrams = True

    def test_unknown_switch(self):
        with pytest.raises(TypeError):
            TokenizerConfig(stemming=True)

    def test_bad_text(self):
        with pytest.raises(ValueError, match='unknown key "stem", expected one of word_unigrams'):
            TokenizerConfig.parse(TokenizerConfig().serialize() + "stem=1\n")
        with pytest.raises(FormatError, match='tokenizer_version is "9"'):
            TokenizerConfig.parse("tokenizer_version=9\n")


class TestVocabulary:
    def test_ids(self, tmp_path):
        vocabulary = write_vocabulary(tmp_path / "v", ["b c a", "c b 手", "c"], num_oov_buckets=2)
        assert [vocabulary.token(i) for i in range(len(vocabulary))] == ["c", "b", "a", "手"]
        assert [vocabulary.count(i) for i in range(len(vocabulary))] == [3, 2, 1, 1]
        assert (len(vocabulary), vocabulary.num_oov_buckets, vocabulary.num_ids) == (4, 2, 6)
        assert vocabulary.path == str(tmp_path / "v")
        assert vocabulary.config == TokenizerConfig(letter_trigrams=False, char_bigrams=False)
        ids = vocabulary.encode("A手 zebra C")
        assert ids.dtype == "int32" and ids[[0, 1, 3]].tolist() == [2, 3, 0] and ids[2] in (4, 5)

    def test_limits(self, tmp_path):
        texts = ["b c a", "c b", "c"]
        assert len(write_vocabulary(tmp_path / "v", texts, min_count=2)) == 2
        assert len(write_vocabulary(tmp_path / "v", texts, max_size=1)) == 1
        assert write_vocabulary(tmp_path / "v", [], num_oov_buckets=3).num_ids == 3
        with pytest.raises(ValueError, match="min_count is 0, expected 1"):
            write_vocabulary(tmp_path / "v", texts, min_count=0)
        with pytest.raises(ValueError, match="the vocabulary would be empty"):
            write_vocabulary(tmp_path / "v", texts, min_count=9)

    def test_builder_takes_any_iterable(self, tmp_path):
        lists, singles, generated = VocabularyBuilder(), VocabularyBuilder(), VocabularyBuilder()
        texts = [f"word{i % 97} 手机" for i in range(10_000)]
        lists.add(texts)
        generated.add(text.encode() for text in texts)
        for text in texts:
            singles.add(text)
        for name, builder in (("lists", lists), ("singles", singles), ("generated", generated)):
            builder.write(tmp_path / name)
        assert (tmp_path / "lists").read_bytes() == (tmp_path / "singles").read_bytes()
        assert (tmp_path / "lists").read_bytes() == (tmp_path / "generated").read_bytes()
        assert len(lists) == len(Vocabulary(tmp_path / "lists"))

    @pytest.mark.parametrize("arrow_type", [pa.string(), pa.large_string(), pa.binary(), pa.large_binary()])
    def test_arrow_equals_lists(self, tmp_path, arrow_type):
        texts = [f"word{i % 97} 手机 12mm" for i in range(40_000)]
        texts[3] = ""
        array = pa.array(["not this", *texts, "nor this"], arrow_type)[1:-1]
        with_null = pa.array([None if i == 3 else text for i, text in enumerate(texts)], arrow_type)
        chunked = pa.chunked_array([array[:7], array[7:7], array[7:]])
        vocabulary = write_vocabulary(tmp_path / "v", texts, TokenizerConfig(), num_oov_buckets=3)
        expected = vocabulary.encode_batch(texts)
        for same in (array, with_null, chunked):
            write_vocabulary(tmp_path / "w", same, TokenizerConfig(), num_oov_buckets=3)
            assert (tmp_path / "w").read_bytes() == (tmp_path / "v").read_bytes()
            for got, want in zip(vocabulary.encode_batch(same), expected, strict=True):
                np.testing.assert_array_equal(got, want)
        assert vocabulary.encode_batch(pa.array([], arrow_type))[1].tolist() == [0]

    def test_arrow_of_another_type_is_refused(self, tmp_path):
        for other in (pa.array([1, 2]), pa.chunked_array([[1.5]]), pa.array(["a", "a"]).dictionary_encode()):
            with pytest.raises(TypeError, match="expected string, large_string, binary or large_binary"):
                VocabularyBuilder().add(other)

    def test_threads_and_memory_do_not_change_the_file(self, tmp_path):
        texts = [f"word{i} 手机{i % 50} {i}mm" for i in range(20_000)]
        files = set()
        for threads in (1, 2, 5):
            for memory in (50_000, 2**30):
                builder = VocabularyBuilder(
                    num_threads=threads, max_memory_bytes=memory, temporary_directory=tmp_path / "."
                )
                builder.add(texts)
                builder.write(tmp_path / "v", max_size=5000)
                files.add((tmp_path / "v").read_bytes())
        assert len(files) == 1 and [path.name for path in tmp_path.iterdir()] == ["v"]

    def test_builder_options(self, tmp_path):
        with pytest.raises(ValueError, match="num_threads is -1, expected 0 to 1024"):
            VocabularyBuilder(num_threads=-1)
        with pytest.raises(ValueError, match="max_memory_bytes is 0, expected at least 1"):
            VocabularyBuilder(max_memory_bytes=0)
        builder = VocabularyBuilder(max_memory_bytes=1, temporary_directory=tmp_path / "missing")
        with pytest.raises(FileNotFoundError, match="cannot create a temporary file"):
            builder.add("red")

    def test_builder_refuses_other_types(self):
        builder = VocabularyBuilder()
        with pytest.raises(TypeError, match="got a text of type int, expected str or bytes"):
            builder.add(["red", 3])
        with pytest.raises(TypeError):
            builder.add(3)

    def test_batch_equals_one_by_one(self, tmp_path):
        vocabulary = write_vocabulary(tmp_path / "v", ["red shoes 手机"], TokenizerConfig(), num_oov_buckets=7)
        texts = ["", "Red 手机", b"\xff shoes", "zebra \ud800"]
        values, row_splits = vocabulary.encode_batch(texts)
        assert (values.dtype, row_splits.dtype) == ("int32", "int64")
        assert row_splits.tolist()[0] == 0 and len(row_splits) == 5 and row_splits[-1] == len(values)
        for i, text in enumerate(texts):
            assert values[row_splits[i] : row_splits[i + 1]].tolist() == vocabulary.encode(text).tolist()
        values, row_splits = vocabulary.encode_batch([])
        assert (values.tolist(), row_splits.tolist()) == ([], [0])

    def test_batch_of_one_text_is_a_mistake(self, tmp_path):
        vocabulary = write_vocabulary(tmp_path / "v", ["red"])
        with pytest.raises(TypeError, match="use encode"):
            vocabulary.encode_batch("red")

    def test_ids_outside_have_no_token(self, tmp_path):
        vocabulary = write_vocabulary(tmp_path / "v", ["red"], num_oov_buckets=5)
        for bad in (-1, 1, 5, 2**40):
            with pytest.raises(IndexError, match=f"id {bad}, expected at least 0 and below the 1 tokens"):
                vocabulary.token(bad)

    def test_fingerprint_is_of_the_content(self, tmp_path):
        first = write_vocabulary(tmp_path / "a", ["red shoes"])
        assert write_vocabulary(tmp_path / "b", ["shoes red"]).fingerprint == first.fingerprint
        assert write_vocabulary(tmp_path / "b", ["red boots"]).fingerprint != first.fingerprint

    def test_bad_files(self, tmp_path):
        path = tmp_path / "v"
        with pytest.raises(FileNotFoundError, match=str(path)):
            Vocabulary(path)
        path.write_bytes(b"nonsense" * 20)
        with pytest.raises(FormatError, match="not a packed file"):
            Vocabulary(path)
        write_vocabulary(path, ["red"])
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        with pytest.raises(FormatError, match=f"{path}: the checksum of the section table"):
            Vocabulary(path)

    def test_threads_share_one(self, tmp_path):
        texts = [f"word{i} 手机{i}" for i in range(500)]
        vocabulary = write_vocabulary(tmp_path / "v", texts, TokenizerConfig(), num_oov_buckets=11)
        builder = VocabularyBuilder()
        expected = vocabulary.encode_batch(texts)[0].tolist()
        results = []

        def work():
            builder.add(texts)
            results.append(vocabulary.encode_batch(texts)[0].tolist())

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [expected] * 4
        builder.write(tmp_path / "w")
        assert Vocabulary(tmp_path / "w").count(0) == 4 * vocabulary.count(0)


def test_counts_of_parts_give_the_whole(tmp_path):
    texts = ["red shoes", "blue shoes", "red"]
    whole = write_vocabulary(tmp_path / "whole", texts, min_count=2, num_oov_buckets=3)
    merged = VocabularyBuilder(whole.config)
    for i, text in enumerate(texts):
        merged.add_counts(write_vocabulary(tmp_path / f"part{i}", [text], num_oov_buckets=1))
    merged.write(tmp_path / "merged", min_count=2, num_oov_buckets=3)
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "whole").read_bytes()
    with pytest.raises(ValueError, match="count all texts with the same tokenizer"):
        VocabularyBuilder().add_counts(whole)
