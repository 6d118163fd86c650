"""What the documents say holds: keys, defaults, files, commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from dpsr_tf.cli import COMMANDS
from dpsr_tf.config import Config, from_dict, to_dict
from dpsr_tf.data.schema import Schema

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_configuration_table_has_every_key_and_default() -> None:
    rows = re.findall(r"^\| `([a-z]+)\.(\w+)` \| *(.*?) *\|", (ROOT / "docs" / "training.md").read_text(), re.MULTILINE)
    documented = {(section, key): default.strip("`") for section, key, default in rows}
    actual = {(s, k): "" if v == "" else str(v) for s, part in to_dict(Config()).items() for k, v in part.items()}
    assert documented == actual


def test_schema_example_is_a_schema() -> None:
    text = (ROOT / "docs" / "data_format.md").read_text()
    example = yaml.safe_load(re.search(r"```yaml\n(items:\n.*?)```", text, re.DOTALL)[1])
    schema = from_dict(Schema, example, "data_format.md")
    # It names every key there is.
    assert set(to_dict(schema)) == set(example)
    for section, part in to_dict(schema).items():
        assert set(part) == set(example[section]), section


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_commands_exist(document: Path) -> None:
    text = document.read_text()
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (document.parent / link).exists(), link
    for command in re.findall(r"^\$? ?dpsr (\w+)", text, re.MULTILINE):
        assert command in COMMANDS, command
