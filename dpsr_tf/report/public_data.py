"""Trains and measures models on public data sets that the user has downloaded."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from dpsr_common.errors import CommandError
from dpsr_tf.data.store import new_directory
from dpsr_tf.report.runner import Artifact, ExperimentRunner, Result
from dpsr_tf.report.shop import Size


@dataclasses.dataclass(frozen=True)
class PublicData:
    """A data set.

    Attributes:
        store: makes the store. This is done before all experiments, so that a wrong directory shows at once.
        measure: trains and measures models on the store.
    """

    store: Callable[[ExperimentRunner, Path], Artifact]
    measure: Callable[[ExperimentRunner, Size, Path, Artifact], Result]


_FOLDS = ("dev", "misspelt_dev")
# The best BM25 that benchmarks/bm25.py found: on the folds dev and misspelt_dev of Home Depot, on which all settings
# are chosen, on the validation fold of MovieLens, and on the fold train of QBQTC.
TUNED_BM25 = {
    "homedepot": "bm25:stem+trigrams=0.3+k1=0.3",
    "movielens": "bm25:b=0.15+title=1+genres=1",
    "qbqtc": "bm25:trigrams=0.8+k1=0.6+b=0.6",
}


def _homedepot_store(runner: ExperimentRunner, path: Path) -> Artifact:
    for fold in _FOLDS:
        if not (path / f"judgments.{fold}.tsv").is_file():
            raise CommandError(f"--homedepot={path}: has no judgments.{fold}.tsv; docs/adapters.md lists the files")
    return runner.public_store("homedepot", path)


def _homedepot(runner: ExperimentRunner, size: Size, path: Path, store: Artifact) -> Result:
    """Home Depot: the best configuration, the paper's hinge loss, and BM25, over all products."""
    wanted = {
        name: functools.partial(runner.model, f"model-homedepot-{preset}", store, size.public_config(preset))
        for name, preset in (("DPSR, best", "homedepot"), ("DPSR, the paper's hinge", "homedepot_hinge"))
    }
    systems: dict[str, str | Artifact] = {
        "BM25": "bm25-words",
        "BM25, our tokens": "bm25",
        "BM25, tuned": TUNED_BM25["homedepot"],
        **runner.run_together(wanted),
    }
    columns = ("--query_column=search_term", "--item_column=product_uid", "--grade_column=relevance")
    flags = (*columns, "--relevant_from=2.33", "--k=10,100,1000", f"--seed={runner.seed}", "--latency_queries=0")
    return {
        fold: runner.evaluation(
            f"homedepot-{fold}", store, systems, path / f"judgments.{fold}.tsv", str(path.resolve()), *flags
        )
        for fold in _FOLDS
    }


def _movielens(runner: ExperimentRunner, size: Size, path: Path, store: Artifact) -> Result:
    """MovieLens 100K: genres as queries; the last ratings in time are held out."""
    profile = {"model.user_features": ["*"]}
    variants: dict[str, dict[str, Any]] = {
        "DPSR": {},
        "DPSR-p": profile,
        "DPSR-h": {**profile, "model.history_length": 20},
    }
    wanted = {
        label: functools.partial(
            runner.model, f"model-movielens-{label}", store, size.public_config("movielens", changes)
        )
        for label, changes in variants.items()
    }
    systems: dict[str, str | Artifact] = {
        "BM25": "bm25",
        "BM25, tuned": TUNED_BM25["movielens"],
        "popularity": "popularity",
        **runner.run_together(wanted),
    }
    return {
        "held out, test fold": runner.evaluation(
            "movielens", store, systems, None, store.digest, f"--seed={runner.seed}", "--latency_queries=0"
        )
    }


def _qbqtc_tables(runner: ExperimentRunner, path: Path) -> Artifact:
    return Artifact(runner.out / "work" / "qbqtc", str(path.resolve()))


def _qbqtc_store(runner: ExperimentRunner, path: Path) -> Artifact:
    source = _qbqtc_tables(runner, path)

    def compute() -> Result:
        folds = {}
        for fold in ("train", "dev"):
            try:
                folds[fold] = [json.loads(line) for line in (path / f"{fold}.json").read_text("utf-8").splitlines()]
            except (OSError, ValueError) as error:
                raise CommandError(
                    f"{path / f'{fold}.json'}: cannot be read: {error}; give the folder of the QBQTC files as --qbqtc"
                ) from None
        titles = {title: i for i, title in enumerate(dict.fromkeys(r["title"] for f in folds.values() for r in f))}
        with new_directory(source.path, True, "tables", "items.parquet") as out:
            items = pa.table({"item_id": list(titles.values()), "title": list(titles)})
            pyarrow.parquet.write_table(items, out / "items.parquet")
            for fold, rows in folds.items():
                columns = {"query": [row["query"] for row in rows], "item": [titles[row["title"]] for row in rows]}
                columns["grade"] = [int(row["relevant"]) for row in rows]
                pyarrow.parquet.write_table(pa.table(columns), out / f"{fold}.parquet")
        return {"items": len(titles)}

    runner.result("qbqtc-tables", {"qbqtc": source.digest}, compute)
    schema = {
        "items": {"files": "items.parquet", "id": "item_id", "text": "title"},
        "interactions": {
            "files": "train.parquet", "query": "query", "item": "item", "label": "grade", "positive_from": 1,
            "negative_to": 0,
        },
        "vocabulary": {"min_count": 2},
    }  # fmt: skip
    return runner.store("store-qbqtc", source, schema)


def _qbqtc(runner: ExperimentRunner, size: Size, path: Path, store: Artifact) -> Result:
    """QBQTC: relevance of Chinese titles, trained on the fold `train`; the items are the titles of both folds."""
    source = _qbqtc_tables(runner, path)
    half = {"train.num_title_queries": size.batch_size // 2}
    wanted = {
        "DPSR": functools.partial(runner.model, "model-qbqtc", store, size.config("dpsr", size.data_steps)),
        "DPSR, half of the queries from titles": functools.partial(
            runner.model, "model-qbqtc-titles", store, size.config("dpsr", size.data_steps, half)
        ),
    }
    systems: dict[str, str | Artifact] = {
        "BM25": "bm25",
        "BM25, tuned": TUNED_BM25["qbqtc"],
        **runner.run_together(wanted),
    }
    dev = source.path / "dev.parquet"
    return {
        "dev": runner.evaluation(
            "qbqtc", store, systems, dev, source.digest, f"--seed={runner.seed}", "--latency_queries=0"
        )
    }


DATA_SETS = {
    "homedepot": PublicData(_homedepot_store, _homedepot),
    "movielens": PublicData(lambda runner, path: runner.public_store("movielens_100k", path), _movielens),
    "qbqtc": PublicData(_qbqtc_store, _qbqtc),
}
