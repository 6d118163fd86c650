"""`dpsr tokenize`: shows the tokens or ids that texts become."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable

from absl import flags

from dpsr_common.errors import CommandError, UsageError
from dpsr_common.packed_file import FormatError
from dpsr_tokenizer import Tokenizer, TokenizerConfig, Vocabulary

USAGE = """
Usage: dpsr tokenize [--config=SWITCH,noSWITCH,... | --vocabulary=FILE [--ids]] [--json] [TEXT ...]

Prints the tokens of each TEXT on one line, for example `red | ##re | #red | #ed#`. Without TEXT, reads one text from
each line of standard input; any bytes are allowed. A TEXT that starts with a dash comes after the argument `--`.
"""
TAKES_ARGUMENTS = True


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string(
        "vocabulary", None, "vocabulary file, which also gives the tokenizer configuration", flag_values=values
    )
    flags.DEFINE_list(
        "config",
        [],
        f"kinds of tokens to turn on or, with 'no' before the name, off: {', '.join(_switch_names())}",
        flag_values=values,
    )
    flags.DEFINE_boolean("ids", False, "print ids of the vocabulary instead of tokens", flag_values=values)
    flags.DEFINE_boolean("json", False, "print a JSON array for each text", flag_values=values)


def run(values: flags.FlagValues, texts: list[str]) -> None:
    """Prints the tokens or ids of each text or, without texts, of each line of standard input.

    Raises:
        CommandError: the vocabulary cannot be read.
        UsageError: the flags are wrong.
    """
    if values.vocabulary is not None:
        if values.config:
            raise UsageError("--config cannot be combined with --vocabulary, which has a configuration of its own")
        vocabulary = _open(values.vocabulary)
        tokenizer = Tokenizer(vocabulary.config)
    elif values.ids:
        raise UsageError("--ids needs --vocabulary=FILE")
    else:
        tokenizer = Tokenizer(parse_config(values.config))
    convert: Callable[[bytes], list[int] | list[str]] = (
        (lambda text: vocabulary.encode(text).tolist()) if values.ids else tokenizer.tokenize
    )
    # No token contains '|', which separates words. A word bigram contains a space.
    separator = " " if values.ids else " | "
    # The tokenizer takes bytes, because arguments and input need not be text in this locale's encoding.
    lines: Iterable[bytes] = map(os.fsencode, texts) if texts else (line.rstrip(b"\n") for line in sys.stdin.buffer)
    is_interactive = not texts and sys.stdin.isatty()
    output = sys.stdout.buffer
    for line in lines:
        items = convert(line)
        shown = json.dumps(items, ensure_ascii=False) if values.json else separator.join(map(str, items))
        output.write(f"{shown}\n".encode())
        if is_interactive:
            output.flush()
    output.flush()


def parse_config(changes: Iterable[str]) -> TokenizerConfig:
    """Applies changes to the default configuration: "word_bigrams" turns a switch on, "noword_bigrams" off.

    Raises:
        UsageError: a change names no switch, or a switch is named twice.
    """
    switches = _switch_names()
    changed: dict[str, bool] = {}
    for change in changes:
        name = change if change in switches else change.removeprefix("no")
        if name not in switches:
            raise UsageError(
                f"--config: unknown switch '{change}', expected one of these, with or without 'no': "
                f"{', '.join(switches)}"
            )
        if name in changed:
            raise UsageError(f"--config: switch '{name}' is given twice")
        changed[name] = name == change
    return TokenizerConfig(**changed)


def _switch_names() -> list[str]:
    return [line.partition("=")[0] for line in TokenizerConfig().serialize().splitlines()[1:]]


def _open(path: str) -> Vocabulary:
    try:
        return Vocabulary(path)
    except (FormatError, OSError) as error:
        raise CommandError(f"cannot read the vocabulary: {error}") from None
