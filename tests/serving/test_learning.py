"""`dpsr search --learn`: the coarse ranking of a pipeline from judged queries."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from gateway_shops import FIRST_ID, Models, running, write_index

# The inverted index finds all 40 items by any of these words, in the order of their ids.
QUERIES = [f"{colour} {kind}" for colour in ("red", "blue", "green") for kind in ("shoes", "boots", "no", "no shoes")]
PIPELINES = """
pipelines:
  words: {recall: {inverted: {k: 40, deadline_ms: 9000}}}
  both:
    recall: {inverted: {k: 40, deadline_ms: 9000}, semantic: {model: dpsr, k: 10, deadline_ms: 9000}}
    coarse: {method: learned, file: fusion.json}
"""


@pytest.fixture
def models() -> Iterator[Models]:
    started = Models()
    yield started
    started.stop()


@pytest.fixture
def folder(tmp_path: Path, models: Models) -> Path:
    """An index, its pipelines, and judgments that agree with the model alone."""
    write_index(tmp_path / "index")
    models_yaml = f"models:\n  dpsr: {{target: '{models.target}'}}\n"
    (tmp_path / "search.yaml").write_text(f"index: index\n{models_yaml}{PIPELINES}")
    relevant = [f"{query}\t{FIRST_ID + 2 * i}\t1\n" for query in QUERIES for i in range(3)]
    (tmp_path / "judgments.tsv").write_text(f"query\titem\tgrade\n{''.join(relevant)}")
    return tmp_path


@pytest.fixture
def learn(folder: Path, dpsr: Callable[..., Any]) -> Callable[..., Any]:
    def run(**flags: Any) -> Any:
        given = {"learn": folder / "judgments.tsv", "pipeline": "both", "out": folder / "fusion.json", **flags}
        named = [f"--{name}={value}" for name, value in given.items() if value is not None]
        return dpsr("search", f"--config={folder / 'search.yaml'}", *named)

    return run


def test_learned_ranking_follows_the_judgments(folder: Path, models: Models, learn: Callable[..., Any]) -> None:
    assert "learned from 12 queries" in learn().succeeds().out
    learned = json.loads((folder / "fusion.json").read_text())
    assert set(learned["sources"]) == {"inverted", "semantic"}
    models.requests["search"].clear()
    with running(PIPELINES, folder, dpsr=models.target) as shop:
        answer = shop.search("green boots", pipeline="both")
        assert [item["id"] for item in answer["items"][:3]] == [FIRST_ID, FIRST_ID + 2, FIRST_ID + 4]
        assert "semantic" in answer["items"][0]["sources"]


def test_the_same_judgments_give_the_same_file(folder: Path, learn: Callable[..., Any]) -> None:
    learn().succeeds()
    before = (folder / "fusion.json").read_bytes()
    learn(out=folder / "again.json").succeeds()
    assert (folder / "again.json").read_bytes() == before


def test_a_source_that_does_not_answer_is_an_error(folder: Path, models: Models, learn: Callable[..., Any]) -> None:
    models.fails["search"] = grpc.StatusCode.UNAVAILABLE
    learn().fails(1, "the query '", "recall.semantic", "as told")
    assert not (folder / "fusion.json").exists()


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        ({"pipeline": None}, 2, "needs --pipeline and --out as well"),
        ({"out": None}, 2, "needs --pipeline and --out as well"),
        ({"pipeline": "none"}, 2, "--pipeline=none: expected one of words, both"),
        ({"learn": "none.tsv"}, 2, "no such file"),
        ({"grade_column": "grades"}, 1, "has no column grades"),
        ({"relevant_from": 2}, 1, "0 queries have a relevant item that a source finds"),
        ({"out": "none/fusion.json"}, 1, "cannot be written"),
    ],
)
def test_wrong_flags(learn: Callable[..., Any], flags: dict[str, Any], status: int, words: str) -> None:
    learn(**flags).fails(status, words)
