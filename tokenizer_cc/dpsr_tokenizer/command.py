"""`dpsr tokenize`: shows the tokens or ids that texts become."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable

from absl import flags

from dpsr_common.packed_file import FormatError
from dpsr_tokenizer import Tokenizer, TokenizerConfig, Vocabulary

USAGE = """
Usage: dpsr tokenize [--config=SWITCH,noSWITCH,... | --vocabulary=FILE [--ids]] [--json] [TEXT ...]

Prints what each text becomes, one line a text: `red | ##re | #red | #ed#`. Without a text it reads lines from
standard input, any bytes. A text that starts with a dash goes after a lone `--`.
"""
TAKES_ARGUMENTS = True


class CommandError(Exception):
    """The command cannot go on, for a reason that its user can mend."""

    status = 1


class UsageError(CommandError):
    """The command was called wrongly."""

    status = 2


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string(
        "vocabulary", None, "Vocabulary file; its tokenizer configuration is the one used.", flag_values=values
    )
    flags.DEFINE_list(
        "config",
        [],
        f"Changes to the default configuration, each a switch or 'no' and a switch: {', '.join(_switch_names())}.",
        flag_values=values,
    )
    flags.DEFINE_boolean("ids", False, "Prints ids of the vocabulary instead of tokens.", flag_values=values)
    flags.DEFINE_boolean("json", False, "Prints one JSON array a text.", flag_values=values)


def run(values: flags.FlagValues, texts: list[str]) -> None:
    """Prints tokens or ids of each text, or of each line of standard input.

    Raises:
        CommandError: the vocabulary cannot be read; UsageError for the flags.
    """
    if values.vocabulary is not None:
        if values.config:
            raise UsageError("--config and --vocabulary exclude each other: a vocabulary carries its configuration")
        vocabulary = _open(values.vocabulary)
        tokenizer = Tokenizer(vocabulary.config)
    elif values.ids:
        raise UsageError("--ids needs --vocabulary=FILE")
    else:
        tokenizer = Tokenizer(parse_config(values.config))
    convert: Callable[[bytes], list[int] | list[str]] = (
        (lambda text: vocabulary.encode(text).tolist()) if values.ids else tokenizer.tokenize
    )
    # '|' is a separator to the tokenizer, so no token holds it; a word bigram holds a space.
    separator = " " if values.ids else " | "
    # Texts are bytes to the tokenizer: what the shell or a file holds need not be text of this locale.
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
    """The default configuration with `changes`: "word_bigrams" turns a switch on, "noword_bigrams" off.

    Raises:
        UsageError: there is no such switch, or it is given twice.
    """
    switches = _switch_names()
    changed: dict[str, bool] = {}
    for change in changes:
        name = change if change in switches else change.removeprefix("no")
        if name not in switches:
            raise UsageError(
                f"--config has no switch '{change}', expected, with or without 'no': {', '.join(switches)}"
            )
        if name in changed:
            raise UsageError(f"--config has the switch {name} twice")
        changed[name] = name == change
    return TokenizerConfig(**changed)


def _switch_names() -> list[str]:
    """The names of all switches."""
    return [line.partition("=")[0] for line in TokenizerConfig().serialize().splitlines()[1:]]


def _open(path: str) -> Vocabulary:
    try:
        return Vocabulary(path)
    except (FormatError, OSError) as error:
        raise CommandError(f"cannot read the vocabulary: {error}") from None
