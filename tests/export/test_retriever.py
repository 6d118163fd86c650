"""Index and servable as retrievers: the same answers as exact search with the checkpoint they were made from."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import Job, dpsr

from dpsr_common.errors import CommandError
from dpsr_tf.data.store import Store
from dpsr_tf.data.user_requests import User
from dpsr_tf.evaluation.corpus import Corpus
from dpsr_tf.evaluation.retriever import Retriever, ask
from dpsr_tf.evaluation.systems import Systems
from dpsr_tf.models.encoders import exact_search

pytestmark = pytest.mark.slow


def retriever(kind: str, directory: str, store: Store) -> Retriever:
    """Makes the system of `dpsr evaluate --system=KIND:DIR`."""
    return Systems(Corpus.of_store(store)).make(f"{kind}:{directory}")


QUERIES = ["phone case", "苹果 手机", "kids keybaord", "", "!!", "zzzzqqq", "a" * 5000] * 20


@pytest.fixture(scope="module")
def exact(job: Job) -> Retriever:
    return exact_search(job.model, Store(job.store))


@pytest.mark.parametrize("kind", ["index", "servable"])
@pytest.mark.parametrize("k", [1, 10, 500])
def test_answers_are_those_of_exact_search(job: Job, exact: Retriever, kind: str, k: int) -> None:
    directory = job.index if kind == "index" else job.servable
    ids, scores = ask(retriever(kind, str(directory), Store(job.store)), QUERIES, [User(3)] * len(QUERIES), k)
    expected_ids, expected_scores = ask(exact, QUERIES, None, k)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)
    # Scores that differ by rounding may change places, the items as a set may differ at the end only.
    for row in range(len(QUERIES)):
        clear = expected_scores[row] > expected_scores[row, -1] + 1e-4
        assert set(expected_ids[row, clear].tolist()) <= set(ids[row].tolist())
        assert ((ids[row] >= 0) == (expected_ids[row] >= 0)).all()
    assert (ids[3] == -1).all() and (ids[0, 0] >= 0) and (ids[:7] == ids[7:14]).all()


def test_an_index_scores_pairs_and_a_servable_does_not(job: Job, exact: Retriever) -> None:
    store = Store(job.store)
    items = np.tile(store.items()["id"][:9], (len(QUERIES), 1))
    found = retriever("index", str(job.index), store).score(QUERIES, None, items)
    np.testing.assert_allclose(found, exact.score(QUERIES, None, items), atol=1e-5)
    assert not hasattr(retriever("servable", str(job.servable / "1"), store), "score")


@pytest.mark.parametrize("kind", ["index", "servable"])
def test_directories_without_one(job: Job, kind: str, tmp_path) -> None:
    with pytest.raises(CommandError, match=f"{tmp_path}: holds no {kind}"):
        retriever(kind, str(tmp_path), Store(job.store))


def test_the_command_measures_them(job: Job, tmp_path) -> None:
    shop, out = job.store.parent / "shop", tmp_path / "figures.json"
    systems = [f"model:{job.model}", f"index:{job.index}", f"servable:{job.servable}"]
    flags = [f"--store={job.store}", f"--judgments={shop / 'judgments.dev.tsv'}", "--slice=kind", f"--json={out}"]
    dpsr("evaluate", *flags, *(f"--system={system}" for system in systems))
    found = json.loads(out.read_text())
    first, *others = (found["systems"][system] for system in systems)
    for other in others:
        assert other["recall@100"] == pytest.approx(first["recall@100"], abs=0.01)
    assert found["slices"]["kind"]
    assert found["notes"][systems[2]][0] == "no top-k and no AUC: the system cannot score given pairs"
