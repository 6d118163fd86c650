"""Keeps the figures that README.md and docs/ quote equal to docs/figures.json.

A quoted figure of a benchmark is followed by an HTML comment that names it, which readers of the page do not see:

    The proxy adds 0.36<!--proxy.added_p50_ms--> ms.
    The model took 12<!--search.p99_ms / 1000--> seconds.

`python -m dpsr_tf.report.quotes` brings all quoted figures up to date, with as many decimals as the page gives. A test
fails as long as one is not. docs/figures.json comes from `dpsr report`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpsr_common.errors import CommandError
from dpsr_common.files import write_text
from dpsr_tf.report.shop import REPOSITORY

FIGURES = "docs/figures.json"
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


def main() -> None:
    """Brings all pages up to date."""
    figures = read_figures()
    for page in pages():
        text = page.read_text()
        new = renewed(text, figures)
        if new != text:
            write_text(page, new)
            print(f"{page.relative_to(REPOSITORY)}: renewed")


if __name__ == "__main__":
    main()
