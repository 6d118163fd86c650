"""Keeps the figures that README.md and docs/ quote equal to docs/figures.json.

A quoted figure of a benchmark is followed by an HTML comment that names it, which readers of the page do not see:

    The proxy adds 0.36<!--proxy.added_p50_ms--> ms.
    The model took 12<!--search.p99_ms / 1000--> seconds.

`python -m dpsr_tf.report.quotes` brings all quoted figures up to date, with as many decimals as the page gives, and
docs/figures.md too. A test fails as long as one is not. `python -m dpsr_tf.report.quotes REPORT` first copies the
figures of the directory of a `dpsr report` to docs/figures.json. Parts that this report did not run keep their figures.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpsr_common.errors import CommandError
from dpsr_common.files import write_text
from dpsr_tf.report.benchmarks import BENCHMARKS, figures_page
from dpsr_tf.report.shop import REPOSITORY

FIGURES = "docs/figures.json"
FIGURES_PAGE = "docs/figures.md"
_QUOTE = re.compile(
    r"(?P<sign>(?<!\w)[+-]|)(?P<figure>\d[\d,]*(?:\.\d+)?)(?P<mark><!--\s*(?P<name>\w+\.\w+)(?P<scale>[^>]*?)\s*-->)"
)
_SCALE = re.compile(r"\s*([*/])\s*(\d+)")
_MARK = re.compile(r"<!--\s*\w+\.\w+[^>]*-->")


def renewed(text: str, figures: Mapping[str, Any]) -> str:
    """Returns a page with the figures of `figures`, the content of figures.json, in place of those that it quotes.

    Raises:
        CommandError: a comment names a bar that was not measured, or follows no figure.
    """

    def figure(match: re.Match[str]) -> str:
        benchmark, _, bar = match["name"].partition(".")
        try:
            value = float(figures[benchmark]["bars"][bar])
        except KeyError:
            raise CommandError(
                f"{match['mark']}: {FIGURES} has no such figure; run `dpsr report --parts={benchmark}`"
            ) from None
        if match["scale"]:
            scale = _SCALE.fullmatch(match["scale"])
            if scale is None:
                raise CommandError(
                    f"{match['mark']}: expected <!--BENCHMARK.BAR-->, with `* N` or `/ N` after it if needed"
                )
            value = value * int(scale[2]) if scale[1] == "*" else value / int(scale[2])
        decimals = len(match["figure"].partition(".")[2])
        sign = "+" if match["sign"] == "+" else ""
        return f"{value:{sign},.{decimals}f}{match['mark']}"

    found = _QUOTE.sub(figure, text)
    if len(_MARK.findall(text)) != len(_QUOTE.findall(text)):
        lost = next(
            mark for mark in _MARK.finditer(text) if not any(mark.end() == q.end() for q in _QUOTE.finditer(text))
        )
        raise CommandError(f"{lost[0]}: follows no figure; put it right after the digits")
    return found


def pages() -> list[Path]:
    """Returns the pages that may quote figures."""
    return [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def read_figures() -> Any:
    """Returns the content of docs/figures.json."""
    return json.loads((REPOSITORY / FIGURES).read_text())


def take(report: Path) -> None:
    """Copies the figures of the directory of a report to docs/figures.json. Other parts keep theirs.

    Raises:
        CommandError: the directory has no figures.json, or it names a part that there is not.
    """
    try:
        found = json.loads((report / "figures.json").read_text())
    except OSError as error:
        raise CommandError(f"{report}: expected the directory of a `dpsr report`: {error}") from None
    figures = read_figures() | found
    if unknown := sorted(figures.keys() - BENCHMARKS.keys()):
        raise CommandError(f"{report}: unknown parts {unknown}; run the report again with this version")
    ordered = {name: figures[name] for name in BENCHMARKS if name in figures}
    write_text(REPOSITORY / FIGURES, json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")


def main(arguments: Sequence[str]) -> None:
    """Brings all pages up to date, with the figures of a report if its directory is given."""
    if len(arguments) > 1:
        raise CommandError("usage: python -m dpsr_tf.report.quotes [DIRECTORY OF A REPORT]")
    if arguments:
        take(Path(arguments[0]))
    figures = read_figures()
    new_texts = {page: renewed(page.read_text(), figures) for page in pages()}
    new_texts[REPOSITORY / FIGURES_PAGE] = figures_page(figures)
    for page, new in new_texts.items():
        if new != page.read_text():
            write_text(page, new)
            print(f"{page.relative_to(REPOSITORY)}: renewed")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except CommandError as error:
        sys.exit(str(error))
