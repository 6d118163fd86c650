"""Keeps the figures that README.md and docs/ quote equal to docs/figures.json.

A quoted figure of a benchmark is followed by an HTML comment that names it, which readers of the page do not see:

    The proxy adds 0.36<!--proxy.added_p50_ms--> ms.
    The model took 12<!--search.p99_ms / 1000--> seconds.

A figure of a peer or of another row names this row: implementation, workload and metric. `*` stands for a
part that needs no name, because the others fit one row alone:

    nginx adds 0.29<!--proxy: nginx; open 300; added p50--> ms.
    The server replays all changes in 4.4<!--fresh: server; *; restart--> s.

A table of the report stands between two comments. What is between them is written anew:

    <!--table experiments: top-1, purchases-->
    <!--end-->

`python -m dpsr_tf.report.quotes` brings all quoted figures up to date, with as many decimals as the page gives, and
docs/figures.md too. A test fails as long as one is not. `python -m dpsr_tf.report.quotes REPORT` first copies the
figures of the directory of a `dpsr report` to docs/figures.json. Parts that this report did not run keep their figures.

docs/figures.json has no rows of benchmarks that were measured before rows were kept. Figures that name one of those
stay as they are until the benchmark is measured again; the command lists them.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpsr_common.errors import CommandError
from dpsr_common.files import write_text
from dpsr_tf.report.benchmarks import BENCHMARKS
from dpsr_tf.report.figures import EXPERIMENTS, figures_page, full_command
from dpsr_tf.report.shop import REPOSITORY

FIGURES = "docs/figures.json"
FIGURES_PAGE = "docs/figures.md"
# A mark names a bar, `BENCHMARK.BAR`, or a row, `BENCHMARK: IMPLEMENTATION; WORKLOAD; METRIC`.
_BAR = r"(?P<benchmark>\w+)\.(?P<bar>\w+)(?P<scale>[^>]*?)"
_ROW = r"(?P<of_rows>\w+): (?P<row>[^;>]+;[^>]+?)(?P<row_scale> [*/] \d+)?"
_QUOTE = re.compile(rf"(?P<sign>(?<!\w)[+-]|)(?P<figure>\d[\d,]*(?:\.\d+)?)(?P<mark><!--\s*(?:{_BAR}|{_ROW})\s*-->)")
_SCALE = re.compile(r"\s*([*/])\s*(\d+)")
_TABLE = re.compile(
    r"^(?P<mark><!--table (?P<part>\w+): (?P<name>[^>\n]+)-->)\n(?:(?!<!--table).)*?<!--end-->$",
    re.DOTALL | re.MULTILINE,
)
_MARK = re.compile(r"<!--\s*(?:\w+\.\w|\w+: [^;>]+;)[^>]*-->")


def renewed(text: str, figures: Mapping[str, Any]) -> str:
    """Returns a page with the figures of `figures`, the content of figures.json, in place of those that it quotes.

    A figure of a row stays as it is if `figures` has the bars of that benchmark, but no rows.

    Raises:
        CommandError: a comment names a bar, a row or a table that was not measured, or follows no figure.
    """

    def figure(match: re.Match[str]) -> str:
        value = _value(match, figures)
        if value is None:
            return match[0]
        if match["scale"] or match["row_scale"]:
            scale = _SCALE.fullmatch(match["scale"] or match["row_scale"])
            if scale is None:
                raise CommandError(
                    f"{match['mark']}: expected <!--BENCHMARK.BAR-->, with `* N` or `/ N` after it if needed"
                )
            value = value * int(scale[2]) if scale[1] == "*" else value / int(scale[2])
        decimals = len(match["figure"].partition(".")[2])
        sign = "+" if match["sign"] == "+" else ""
        return f"{value:{sign},.{decimals}f}{match['mark']}"

    def table(match: re.Match[str]) -> str:
        tables = figures.get(match["part"], {}).get("tables", {})
        if match["name"] not in tables:
            near = difflib.get_close_matches(match["name"], tables, 3, 0)
            raise CommandError(
                f"{match['mark']}: {FIGURES} has no such table; tables with such names: {' | '.join(near)}"
            )
        return "\n".join([match["mark"], "", *tables[match["name"]], "", "<!--end-->"])

    if len(re.findall(r"^<!--table [^>]*-->$", text, re.MULTILINE)) != len(_TABLE.findall(text)):
        raise CommandError("expected <!--end--> after each <!--table PART: NAME-->")
    text = _TABLE.sub(table, text)
    found = _QUOTE.sub(figure, text)
    if len(_MARK.findall(text)) != len(_QUOTE.findall(text)):
        lost = next(
            mark for mark in _MARK.finditer(text) if not any(mark.end() == q.end() for q in _QUOTE.finditer(text))
        )
        raise CommandError(f"{lost[0]}: follows no figure; put it right after the digits")
    return found


def waiting(text: str, figures: Mapping[str, Any]) -> Counter[str]:
    """Returns how many figures of a page wait for rows of a benchmark, by the name of the benchmark."""
    named = Counter(match["of_rows"] for match in _QUOTE.finditer(text) if match["of_rows"])
    return Counter({name: count for name, count in named.items() if "rows" not in figures.get(name, {})})


def _value(match: re.Match[str], figures: Mapping[str, Any]) -> float | None:
    """Returns what a quote names; None for a row of a benchmark whose rows are not kept yet."""
    name = match["benchmark"] or match["of_rows"]
    missing = CommandError(f"{match['mark']}: {FIGURES} has no such figure; run `dpsr report --parts={name}`")
    if name not in figures:
        raise missing
    if match["benchmark"]:
        bars = figures[name]["bars"]
        if match["bar"] not in bars:
            raise missing
        return float(bars[match["bar"]])
    if "rows" not in figures[name]:
        return None
    wanted = [part.strip() for part in match["row"].split(";")]
    rows = figures[name]["rows"]
    found = [row for row in rows if _fits(wanted, row.split("; "))]
    if len(found) != 1:
        near = found or difflib.get_close_matches("; ".join(wanted), rows, 3, 0)
        raise CommandError(
            f"{match['mark']}: {len(found)} rows of {FIGURES} have this name, expected 1; rows with such names: "
            + " | ".join(near[:3])
        )
    return float(rows[found[0]])


def _fits(wanted: Sequence[str], parts: Sequence[str]) -> bool:
    """Returns whether a row has the wanted parts."""
    return len(wanted) == len(parts) and all(want in ("*", part) for want, part in zip(wanted, parts, strict=True))


def pages() -> list[Path]:
    """Returns the pages that may quote figures."""
    return [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def read_figures() -> Any:
    """Returns the content of docs/figures.json."""
    return json.loads((REPOSITORY / FIGURES).read_text())


def take(report: Path) -> None:
    """Copies the figures of the directory of a report to docs/figures.json. Other parts keep theirs.

    Raises:
        CommandError: the directory has no figures.json, or it has figures of a part that does not exist, or figures
            that were measured by another command than that of a full report.
    """
    try:
        found = json.loads((report / "figures.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CommandError(f"{report}: expected the directory of a `dpsr report`: {error}") from None
    figures = read_figures() | found
    known = [EXPERIMENTS, *BENCHMARKS]
    if unknown := sorted(figures.keys() - set(known)):
        raise CommandError(f"{report}: unknown parts {unknown}; run the report again with this version")
    for name, one in found.items():
        if one["command"] != full_command(name):
            raise CommandError(f"{report}: {name} ran as `{one['command']}`; expected `{full_command(name)}`")
    ordered = {name: figures[name] for name in known if name in figures}
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
    for page in pages():
        for name, count in waiting(page.read_text(), figures).items():
            print(f"{page.relative_to(REPOSITORY)}: {count} figures wait for `dpsr report --parts={name}`")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except CommandError as error:
        sys.exit(str(error))
