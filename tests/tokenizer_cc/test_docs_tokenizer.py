"""The examples of docs/tokenizer.md."""

from __future__ import annotations

import doctest
import os
import re
import shlex
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from dpsr_common.command_line import main
from dpsr_tokenizer import TokenizerConfig

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "tokenizer.md").read_text()


def test_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    test = doctest.DocTestParser().get_doctest("".join(blocks), {}, "docs/tokenizer.md", None, None)
    assert len(test.examples) > 30
    assert doctest.DocTestRunner(optionflags=doctest.IGNORE_EXCEPTION_DETAIL).run(test).failed == 0


def test_command(capfd):
    (block,) = re.findall(r"^```\n\$ dpsr (.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    command, shown = block.split("\n", 1)
    assert main(shlex.split(command)) == 0
    assert capfd.readouterr().out == shown


def test_table_of_switches():
    rows = re.findall(r"^\| `(\w+)` \| (on|off) \|", TEXT, re.MULTILINE)
    switches = [line.split("=") for line in TokenizerConfig().serialize().splitlines()[1:]]
    assert [[name, str(int(default == "on"))] for name, default in rows] == switches
