"""Checks golden.tsv with the Python module, the TensorFlow op and `dpsr tokenize`. tokenizer_cc/golden_test.cc: C++."""

from __future__ import annotations

import json
import os
from collections import defaultdict

import pytest
from golden import Case, read_golden
from reference import DEFAULTS, tokenize

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import tensorflow as tf

from dpsr_common.command_line import main
from dpsr_tokenizer import Tokenizer, TokenizerConfig, Vocabulary, VocabularyBuilder
from dpsr_tokenizer.tf_ops import VocabularyTable

CASES = read_golden()
BY_CONFIG: dict[tuple[str, ...], list[Case]] = defaultdict(list)
for each in CASES:
    BY_CONFIG[tuple(each.switches)].append(each)


def named(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: f"line{case.line}")


def test_the_file_is_read_whole():
    assert len(CASES) > 350 and len(BY_CONFIG) > 15
    assert len({(tuple(case.switches), case.text) for case in CASES}) == len(CASES)
    for name in DEFAULTS:
        assert {getattr(case.config, name) for case in CASES} == {True, False}, name


@named(CASES)
def test_module(case):
    assert Tokenizer(case.config).tokenize(case.text) == case.tokens


@named(CASES)
def test_reference(case):
    """The implementation in reference.py, which test_properties.py uses on random texts, passes the file, too."""
    assert tokenize(case.text, **{name: getattr(case.config, name) for name in DEFAULTS}) == case.tokens


@pytest.mark.parametrize("switches", BY_CONFIG, ids=",".join)
def test_ids_of_module_op_and_command(switches, tmp_path, capfdbinary):
    """A vocabulary of all tokens, so that ids can be turned back into tokens."""
    cases = BY_CONFIG[switches]
    path = tmp_path / "vocabulary.dpsr"
    builder = VocabularyBuilder(cases[0].config)
    builder.add([case.text for case in cases])
    builder.write(path, num_oov_buckets=1)
    vocabulary = Vocabulary(path)
    expected = [case.tokens for case in cases]

    def tokens(rows):
        return [[vocabulary.token(i) for i in row] for row in rows]

    assert vocabulary.config == cases[0].config
    assert tokens(vocabulary.encode(case.text) for case in cases) == expected
    assert tokens(VocabularyTable(path).tokenize(tf.constant([case.text for case in cases])).to_list()) == expected
    # An argument cannot hold NUL; the others go through the command as they are.
    rows = [(case.text, case.tokens) for case in cases if b"\0" not in case.text]
    arguments = [os.fsdecode(text) for text, _ in rows]
    assert main(["tokenize", f"--vocabulary={path}", "--ids", "--json", "--", *arguments]) == 0
    shown = capfdbinary.readouterr().out.splitlines()
    assert tokens(map(json.loads, shown)) == [row for _, row in rows]
    assert main(["tokenize", f"--config={','.join(switches)}", "--json", "--", *arguments]) == 0
    assert [json.loads(line) for line in capfdbinary.readouterr().out.splitlines()] == [row for _, row in rows]


def test_switches_of_the_reference_are_those_of_the_core():
    assert {name: getattr(TokenizerConfig(), name) for name in DEFAULTS} == DEFAULTS
    assert len(TokenizerConfig().serialize().splitlines()) == 1 + len(DEFAULTS)
