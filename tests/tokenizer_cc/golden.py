"""Reads golden.tsv. As a script it writes the seeds of the fuzz targets: python golden.py FOLDER (see `make fuzz`)."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

from dpsr_tokenizer import TokenizerConfig, VocabularyBuilder
from dpsr_tokenizer.command import parse_config

PATH = Path(__file__).with_name("golden.tsv")


class Case(NamedTuple):
    """A line of golden.tsv."""

    line: int
    switches: list[str]
    text: bytes
    tokens: list[str]

    @property
    def config(self) -> TokenizerConfig:
        """The configuration that the switches give."""
        return parse_config(self.switches)


def read_golden() -> list[Case]:
    """Reads every line of golden.tsv that is not a comment."""
    cases = []
    for number, line in enumerate(PATH.read_text().splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        switches, text, tokens = line.split("\t")
        cases.append(
            Case(number, switches.split(",") if switches != "default" else [], _text(text), json.loads(tokens))
        )
    return cases


def _text(field: str) -> bytes:
    if not field.startswith("b"):
        return json.loads(field).encode()
    return re.sub(rb"\\x(..)", lambda match: bytes.fromhex(match[1].decode()), field[2:-1].encode())


def write_seeds(folder: Path) -> None:
    """Writes each seed as a file (texts, configurations, vocabularies) into a folder for each fuzz target."""
    names = [line.partition("=")[0] for line in TokenizerConfig().serialize().splitlines()[1:]]
    for target in ("tokenizer_fuzz", "tokenizer_config_fuzz", "vocabulary_fuzz"):
        (folder / target).mkdir(parents=True, exist_ok=True)
    for n, case in enumerate(read_golden()):
        # As tokenizer_fuzz.cc reads its input: a byte of switches, then the text.
        switches = sum(getattr(case.config, name) << i for i, name in enumerate(names))
        (folder / "tokenizer_fuzz" / str(n)).write_bytes(bytes([switches]) + case.text)
        (folder / "tokenizer_config_fuzz" / str(switches)).write_text(case.config.serialize())
        # As vocabulary_fuzz.cc does: whether to mend the checksums, then the file.
        if n % 8 == 0:
            builder = VocabularyBuilder(case.config)
            builder.add(case.text)
            file = folder / "vocabulary_fuzz" / str(n)
            builder.write(file, num_oov_buckets=n % 3 + 1)
            data = file.read_bytes()
            for mend in (0, 1):
                (file.parent / f"{n}.{mend}").write_bytes(bytes([mend]) + data)
            file.unlink()


if __name__ == "__main__":
    write_seeds(Path(sys.argv[1]))
