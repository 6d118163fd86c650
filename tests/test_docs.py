"""Checks the documents against the code: keys, defaults, files, commands, messages."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import tomllib
import yaml
from absl import flags

from dpsr_common import __version__
from dpsr_common.command_line import commands
from dpsr_common.typed_config import from_dict, to_dict
from dpsr_tf.data.schema import Schema
from dpsr_tf.reference import reference
from dpsr_tf.report.figures import figures_page
from dpsr_tf.report.quotes import pages, read_figures, renewed

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def test_configuration_reference_is_that_of_the_dataclasses() -> None:
    message = "run `python -m dpsr_tf.reference > docs/configuration.md`"
    assert (ROOT / "docs" / "configuration.md").read_text() == reference(), message


def test_quoted_figures_are_those_that_were_measured() -> None:
    figures = read_figures()
    message = "run `python -m dpsr_tf.report.quotes`"
    assert (ROOT / "docs" / "figures.md").read_text() == figures_page(figures), message
    for page in pages():
        text = page.read_text()
        assert text == renewed(text, figures), message


def test_schema_example_is_a_schema() -> None:
    text = (ROOT / "docs" / "data_format.md").read_text()
    example = yaml.safe_load(re.search(r"```yaml\n(items:\n.*?)```", text, re.DOTALL)[1])
    schema = from_dict(Schema, example, "data_format.md")
    # The example has every key of the schema.
    assert set(to_dict(schema)) == set(example)
    for section, part in to_dict(schema).items():
        assert set(part) == set(example[section]), section


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_commands_exist(document: Path) -> None:
    text = document.read_text()
    for link, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
        page = document.parent / link if link else document
        assert page.exists(), link
        assert not anchor or anchor in anchors_of(page), f"{link}#{anchor}"
    whole_lines = text.replace("\\\n", "")
    for command, rest in re.findall(r"^\$? ?dpsr (\w+)([^#\n]*)", whole_lines, re.MULTILINE):
        assert command in commands(), command
        module = commands()[command].load()
        if not getattr(module, "PASS_UNKNOWN_FLAGS", False):
            assert set(re.findall(r" \[?--(\w+)", rest)) <= flags_of(module), f"dpsr {command}{rest}"


def test_navigation_of_the_site_has_every_page() -> None:
    named = re.findall(r"^ +- .*: (\w+)\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(named) == len(set(named))
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} <= set(named)


def test_figures_beside_the_papers_stand_on_the_pages_they_link() -> None:
    checked = 0
    for cell in re.split(r" \| |\n", (ROOT / "docs" / "papers.md").read_text()):
        linked = "".join((ROOT / "docs" / page).read_text() for page in re.findall(r"\]\((\w+\.md)", cell))
        said = re.sub(r"\]\([^)]*\)", "]", cell)
        for figure in re.findall(r"(?<![\d.,])(\d+\.\d{2,}|\d{1,3}(?:,\d{3})+)(?![\d.])", said) if linked else []:
            assert figure in linked, f"{figure}: {cell}"
            checked += 1
    assert checked > 90


def test_changelog_begins_with_this_version_and_its_breaking_changes() -> None:
    headings = re.findall(r"^##+ .*$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert re.fullmatch(rf"## {re.escape(__version__)} \((\d{{4}}-\d\d-\d\d|not released yet)\)", headings[0])
    assert headings[1] == "### Breaking changes"


def test_versions_of_the_site_are_pinned() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    assert set(extras["docs"]) <= set(pinned)


@pytest.mark.parametrize("picture", sorted((ROOT / "docs" / "images").glob("*.svg")), ids=lambda path: path.name)
def test_pictures_are_complete_and_shown(picture: Path) -> None:
    root = ElementTree.parse(picture).getroot()
    width, height = (float(size) for size in root.attrib["viewBox"].split()[2:])
    for element in root.iter():
        x, y = float(element.get("x", 0)), float(element.get("y", 0))
        assert 0 <= x <= width and 0 <= y <= height, ElementTree.tostring(element)
    assert "http" not in picture.read_text().replace("http://www.w3.org/2000/svg", "")
    assert any(f"](images/{picture.name})" in page.read_text() for page in DOCUMENTS)


def anchors_of(page: Path) -> set[str]:
    """Returns the anchors of a page: its headings in lower case, words joined by dashes."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def flags_of(module: ModuleType) -> set[str]:
    values = flags.FlagValues()
    module.define_flags(values)
    return {"help", *values}


def test_messages_of_the_troubleshooting_page_are_those_of_the_code() -> None:
    folders = ("Makefile", "setup.py", "CMakeLists.txt", "common", "tokenizer_cc", "dpsr_tf", "export", "serving")
    files = [
        file
        for folder in map(ROOT.joinpath, folders)
        for file in ([folder] if folder.is_file() else folder.rglob("*"))
        if file.suffix in (".py", ".cc", ".h", ".txt", "") and file.is_file() and "bin" not in file.parts
    ]
    # Join string literals that continue on the next line.
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(file.read_text() for file in files))
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = [text for _, text in re.findall(r"^\| (`+)(.+?)\1 \|", page, re.MULTILINE)]
    assert len(messages) > 20
    missing = [text for text in messages if not all(part in code for part in text.split("…"))]
    assert not missing
