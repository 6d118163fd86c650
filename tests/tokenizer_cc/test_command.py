from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from dpsr_common.command_line import main
from dpsr_tokenizer import TokenizerConfig, Vocabulary, VocabularyBuilder


def dpsr(*arguments, stdin=b""):
    return subprocess.run(
        [sys.executable, "-m", "dpsr_common", "tokenize", *arguments], input=stdin, capture_output=True
    )


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "vocabulary.dpsr"
    builder = VocabularyBuilder(TokenizerConfig(word_bigrams=True, letter_trigrams=False))
    builder.add(["red shoes", "red 手机"])
    builder.write(path)
    return Vocabulary(path)


def test_arguments(capfdbinary):
    assert main(["tokenize", "Red 手机", "", "tv"]) == 0
    shown = "red | ##re | #red | #ed# | 手 | 机 | 手机\n\ntv | ##tv | #tv#\n"
    assert capfdbinary.readouterr() == (shown.encode(), b"")


def test_json_and_switches(capfdbinary):
    assert main(["tokenize", "--json", "--config=word_bigrams,noletter_trigrams", "red tv 手", "!"]) == 0
    assert capfdbinary.readouterr().out == '["red", "tv", "red tv", "手"]\n[]\n'.encode()


def test_the_separator_is_never_in_a_token(capfdbinary):
    assert main(["tokenize", "--config=word_bigrams,noletter_trigrams", "a | b|c"]) == 0
    assert capfdbinary.readouterr().out == b"a | b | a b | c | b c\n"


def test_vocabulary(vocabulary, capfdbinary):
    text = "red shoes unknown 手"
    assert main(["tokenize", f"--vocabulary={vocabulary.path}", text]) == 0
    shown = "red | shoes | red shoes | unknown | shoes unknown | 手\n"
    assert capfdbinary.readouterr().out == shown.encode()
    assert main(["tokenize", f"--vocabulary={vocabulary.path}", "--ids", text, ""]) == 0
    ids = vocabulary.encode(text).tolist()
    assert len(ids) == 4  # without buckets what is unknown has no id
    assert capfdbinary.readouterr().out == f"{' '.join(map(str, ids))}\n\n".encode()
    assert main(["tokenize", f"--vocabulary={vocabulary.path}", "--ids", "--json", text]) == 0
    assert json.loads(capfdbinary.readouterr().out) == ids


def test_lines_of_standard_input():
    done = dpsr("--config=noletter_trigrams", stdin="Red shoes\r\n\n手机\n".encode() + b"a\xffb\0c\nlast")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode().split("\n") == ["red | shoes", "", "手 | 机 | 手机", "a | b | c", "last", ""]
    assert dpsr(stdin=b"").stdout == b""


def test_arguments_may_be_any_bytes():
    assert dpsr("--config=noletter_trigrams", b"caf\xe9 au lait").stdout == b"caf | au | lait\n"
    assert dpsr("--config=noletter_trigrams", "--", "--red").stdout == b"red\n"


def test_output_is_utf8_in_any_locale():
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "dpsr_common", "tokenize"]
    done = subprocess.run(command, input="手".encode(), capture_output=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "手\n".encode())


def test_a_reader_that_leaves_early():
    command = f"{sys.executable} -m dpsr_common.command_line tokenize | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], input=b"red\n" * 200_000, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"red | ##re | #red | #ed#\n", b"")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--ids", "red"], 2, "--ids needs --vocabulary=FILE"),
        (
            ["--config=stems", "red"],
            2,
            "--config: unknown switch 'stems', expected one of these, with or without 'no': word_",
        ),
        (["--config=markers,nomarkers"], 2, "--config: switch 'markers' is given twice"),
        (["--config=markers", "--vocabulary=v"], 2, "--config cannot be combined with --vocabulary"),
        (["--stem"], 2, "stem"),
        (["--vocabulary={tmp}/missing", "red"], 1, "cannot read the vocabulary: {tmp}/missing"),
        (["--vocabulary={tmp}", "red"], 1, "not a regular file"),
        (["--vocabulary={tmp}/text", "red"], 1, "not a packed file"),
    ],
)
def test_errors(arguments, status, message, tmp_path, capfd):
    (tmp_path / "text").write_text("no vocabulary " * 20)
    assert main(["tokenize", *(argument.format(tmp=tmp_path) for argument in arguments)]) == status
    out, error = capfd.readouterr()
    assert out == "" and error.count("\n") == 1
    assert error.startswith("dpsr tokenize: error: ") and message.format(tmp=tmp_path) in error


def test_help_names_every_switch(capfd):
    assert main(["tokenize", "--help"]) == 0
    shown = capfd.readouterr().out
    for line in TokenizerConfig().serialize().splitlines()[1:]:
        assert line.partition("=")[0] in shown


def test_needs_no_tensorflow():
    code = (
        "import sys; from dpsr_common.command_line import main; main(['tokenize', 'red']);"
        "sys.exit('tensorflow' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
