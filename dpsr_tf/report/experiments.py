"""The experiments of the report. Each trains models on a store, measures them, and returns a JSON object."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from dpsr_common.files import write_text
from dpsr_tf.config import shipped_config
from dpsr_tf.data.store import RowsById, new_directory
from dpsr_tf.evaluation.baselines import unigrams
from dpsr_tf.evaluation.judgments import Judgments
from dpsr_tf.models.encoders import exact_search, item_embeddings, query_encoder
from dpsr_tf.report.ablations import ablate
from dpsr_tf.report.ceilings import ceilings
from dpsr_tf.report.claims import claims
from dpsr_tf.report.online import online, treatments
from dpsr_tf.report.polysemy import polysemy
from dpsr_tf.report.public_data import DATA_SETS
from dpsr_tf.report.runner import Artifact, ExperimentRunner, Result
from dpsr_tf.report.shop import TRAINING, TUNED_BM25, Shop, Size

# The names of Table 2 -> the system of `dpsr evaluate`, or the file in configs/ and its changes. The options of the
# tuned BM25 were chosen by benchmarks/bm25.py on the dev queries of the shop of seed 4, like TRAINING.
BASELINES = {
    "BM25": "bm25",
    "BM25-u&b": "bm25-bigrams",
    "BM25, tuned": f"bm25:{TUNED_BM25}",
    "popularity": "popularity",
}
# DSSM has the layers and item features of DPSR, so that only its loss, its negatives and its start differ. Its authors
# start all weights at random. With our start, texts that share words are near each other before any training.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "DSSM": ("dssm", {}),
    "DSSM, our start": ("dssm", {"model.aligned_start": True}),
    "DPSR": ("dpsr", TRAINING),
    "DPSR-p": ("dpsr_p", TRAINING),
    "DPSR-h": ("dpsr_h", TRAINING),
}
# For the comparison of one head with two: training scores as retrieval does, by the best head (beta 0), and uses no
# unclicked items.
HEADS = {**TRAINING, "train.num_own_negatives": 0, "model.temperature": 0.0}


def run(runner: ExperimentRunner, size: Size, ablations: bool, data: Mapping[str, Path]) -> Result:
    """Runs all experiments.

    Args:
        runner: keeps the results.
        size: size of the experiments.
        ablations: also runs the ablations, and the trainings that check claims of section 4.
        data: `homedepot`, `movielens`, `qbqtc` -> directory of the files, for those that are given.

    Returns:
        The results of the functions below, in lists where there is one for each shop, and `shops`, their seeds.
    """
    stores = {name: DATA_SETS[name].store(runner, path) for name, path in data.items()}
    shops = [Shop(runner, size, number) for number in range(size.shops)]
    widths = (*(dim for dim in size.widths if dim != _usual_dim()), _usual_dim())
    first = shops[0]
    models = _train(runner, shops, size)
    tables = [table2(shop, models[shop.number]) for shop in shops]
    found: Result = {
        "shops": [shop.seed for shop in shops],
        "shop": json.loads((first.directory.path / "truth.json").read_text())["counts"],
        "table2": tables,
        "ceilings": [ceilings(shop) for shop in shops],
        "polysemy": [polysemy(shop, {dim: _pair(models[shop.number], dim) for dim in widths}) for shop in shops],
        "mixing": [mixing(shop, models[shop.number]) for shop in shops],
        "online": [online(shop, treatments(models[shop.number], _with_heads(2, _usual_dim()))) for shop in shops],
        "topology": topology(first, models[0]["DPSR"]),
        "examples": polysemy_examples(first, models[0]),
        "cases": cases(first, models[0]["DPSR"]),
        "projector": projector(first, models[0]["DPSR"]),
    }
    if ablations:
        found["ablations"] = ablate(first)
        found["claims"] = [claims(shop) for shop in shops]
    found["data"] = {name: DATA_SETS[name].measure(runner, size, path, stores[name]) for name, path in data.items()}
    return found


def _train(runner: ExperimentRunner, shops: Sequence[Shop], size: Size) -> list[dict[str, Artifact]]:
    """Trains the models of all shops. Returns label -> model for each shop."""
    wanted: dict[tuple[int, str], Callable[[], Artifact]] = {}
    for shop in shops:
        named = {
            label: functools.partial(shop.model, label.replace(", ", "-").replace(" ", "-"), preset, changes)
            for label, (preset, changes) in MODELS.items()
        }
        for dim in (_usual_dim(), *size.widths):
            for heads in (1, 2):
                change = {**HEADS, "model.num_heads": heads, "model.embedding_dim": dim}
                named[_with_heads(heads, dim)] = functools.partial(shop.model, f"heads-{heads}-{dim}", "dpsr", change)
        # On the other shops the smallest and the largest alpha show whether the result of the first shop holds.
        for alpha in size.mixing_ratios if shop.number == 0 else (min(size.mixing_ratios), max(size.mixing_ratios)):
            change = {"train.mixing_ratio": alpha}
            named[f"{alpha:g}"] = functools.partial(shop.model, f"alpha-{alpha:g}", "dpsr", change)
        wanted |= {(shop.number, label): train for label, train in named.items()}
    made = runner.run_together(wanted)
    return [{label: model for (number, label), model in made.items() if number == shop.number} for shop in shops]


def _usual_dim() -> int:
    return int(shipped_config("dpsr")["model"]["embedding_dim"])


def _heads(number: int) -> str:
    return f"{number} head{'s' * (number > 1)}"


def _with_heads(number: int, dim: int) -> str:
    return f"{_heads(number)}, d {dim}"


def _pair(models: Mapping[str, Artifact], dim: int) -> dict[str, Artifact]:
    """Returns the models with one head and with two, by label."""
    return {_heads(number): models[_with_heads(number, dim)] for number in (1, 2)}


def table2(shop: Shop, models: Mapping[str, Artifact]) -> Result:
    """Table 2: top-k on purchases after the end of the log, AUC on graded pairs, recall of queries not in the log.

    On the first shop also the latency of 1,000 items.
    """
    systems: dict[str, str | Artifact] = {**BASELINES, **{label: models[label] for label in MODELS}}
    users = ("--user_column=user_id", "--time_column=time")
    bought = shop.evaluate("purchases", systems, "judgments.personal.tsv", *users, "--latency_queries=0")
    flags = ("--user_column=user_id", "--relevant_from=3", "--latency_queries=0")
    graded = shop.evaluate("labels", systems, str(_labels_of_users(shop)), *flags)
    slices = ("--slice=kind", "--slice=kind_and_language")
    unseen = shop.evaluate("unseen", systems, str(_judgments_with_languages(shop)), *slices, "--latency_queries=0")
    found = {"seed": shop.seed, "purchases": bought, "labels": graded, "unseen": unseen}
    if not shop.number:
        fast = ("--k=1000", "--max_queries=100", "--bootstrap=0")
        found["times"] = shop.evaluate("times", systems, "judgments.personal.tsv", *users, *fast)
    return found


def _labels_of_users(shop: Shop) -> Path:
    """Writes the graded pairs with a random user for each query, and returns the file.

    The grades say what the query means, whoever asks. With a user, DPSR-p and DPSR-h read a profile and a history, as
    they do in training; without one they would be measured on input that they hardly ever saw. The history of a user
    ends with the log.
    """
    labels = pyarrow.parquet.read_table(shop.directory.path / "labels.parquet")
    users = pyarrow.parquet.read_table(shop.directory.path / "users.parquet", columns=["user_id"])["user_id"].to_numpy()
    queries, query_of_row = np.unique(labels["query"].to_numpy(), return_inverse=True)
    drawn = np.random.default_rng(shop.seed).choice(users, len(queries))[query_of_row]
    path = shop.runner.out / "work" / f"{shop.experiment_name('labels-of-users')}.parquet"
    pyarrow.parquet.write_table(labels.append_column("user_id", pa.array(drawn)), path)
    return path.resolve()


def _judgments_with_languages(shop: Shop) -> Path:
    """Writes the judgments of queries that are not in the log, with a column such as "typo, zh"; returns the file."""
    queries, misspelt = shop.truth_table("queries"), shop.truth_table("misspellings")
    languages = dict(zip(queries["query"], queries["language"], strict=True))
    right = dict(zip(misspelt["query"], misspelt["right"], strict=True))
    names, *rows = (shop.directory.path / "judgments.test.tsv").read_text().splitlines()
    query, kind = names.split("\t").index("query"), names.split("\t").index("kind")
    lines = [f"{names}\tkind_and_language"]
    for row in rows:
        cells = row.split("\t")
        lines.append(f"{row}\t{cells[kind]}, {languages[right.get(cells[query], cells[query])]}")
    path = shop.runner.out / "work" / f"{shop.experiment_name('judgments-with-languages')}.tsv"
    write_text(path, "\n".join(lines) + "\n")
    return path.resolve()


def mixing(shop: Shop, models: Mapping[str, Artifact]) -> Result:
    """Figure 7: relevance and popularity of the retrieved items by the share of random negatives."""
    alphas = sorted(alpha for alpha in shop.size.mixing_ratios if f"{alpha:g}" in models)
    systems = {f"{alpha:g}": models[f"{alpha:g}"] for alpha in alphas}
    users = ("--user_column=user_id", "--time_column=time")
    bought = shop.evaluate("mixing-purchases", systems, "judgments.personal.tsv", *users, "--latency_queries=0")
    unseen = shop.evaluate("mixing-unseen", systems, "judgments.test.tsv", "--latency_queries=0")
    return {"seed": shop.seed, "alpha": alphas, "purchases": bought, "unseen": unseen}


def _plane(embeddings: np.ndarray, seed: int) -> list[list[float]]:
    """Returns t-SNE coordinates [n, 2], rounded to four decimals."""
    perplexity = min(30, (len(embeddings) - 1) / 3)
    # One thread gives the same figures on any number of cores, and is not slower here.
    with threadpool_limits(1):
        points = TSNE(2, init="pca", perplexity=perplexity, random_state=seed).fit_transform(embeddings)
    return [[round(float(x), 4) for x in point] for point in points]


def _popular_types(shop: Shop, count: int) -> tuple[list[str], dict[str, Any]]:
    """Returns the most popular types, and the table truth/items with `row` (in the store) and `category`."""
    items = shop.truth_table("items")
    items["row"] = RowsById(shop.opened_store.items()["id"])(np.array(items["item_id"])).tolist()
    category = pyarrow.parquet.read_table(
        shop.directory.path / "items.parquet", columns=["item_id", "category"]
    ).to_pydict()
    of_item = dict(zip(category["item_id"], category["category"], strict=True))
    items["category"] = [of_item[item] for item in items["item_id"]]
    total: dict[str, float] = {}
    for name, popularity in zip(items["type"], items["popularity"], strict=True):
        total[name] = total.get(name, 0.0) + popularity
    return sorted(total, key=lambda name: -total[name])[:count], items


def topology(shop: Shop, model: Artifact) -> Result:
    """Figure 5: t-SNE of the most popular items of the 33 most popular types of product."""

    def compute() -> Result:
        types, items = _popular_types(shop, 33)
        rows: list[int] = []
        for name in types:
            mine = [row for row, item_type in enumerate(items["type"]) if item_type == name]
            mine.sort(key=lambda row: -items["popularity"][row])
            rows += mine[: shop.size.plotted_items // len(types)]
        embeddings = item_embeddings(model.path, shop.opened_store)[[items["row"][row] for row in rows]]
        category = {items["type"][row]: items["category"][row] for row in rows}
        by_category = sorted(category, key=lambda name: category[name])
        return {
            "points": _plane(embeddings, shop.seed),
            "type": [items["type"][row] for row in rows],
            "category": {name: category[name] for name in by_category},
        }

    return shop.result("topology", {"model": model}, compute, items=shop.size.plotted_items)


def polysemy_examples(shop: Shop, models: Mapping[str, Artifact]) -> Result:
    """Figure 6: t-SNE of items and what each head finds, for the two most frequent polysemous queries in English."""
    pair = _pair(models, _usual_dim())

    def compute() -> Result:
        table = shop.truth_table("queries")
        asked = [
            row
            for row, language in enumerate(table["language"])
            if language == "en" and len(table["meanings"][row]) > 1
        ]
        asked.sort(key=lambda row: -table["requests"][row])
        types, items = _popular_types(shop, 10)
        titles = dict(zip(shop.opened_store.items()["id"].tolist(), shop.opened_store.titles(), strict=True))
        embeddings = {label: item_embeddings(model.path, shop.opened_store) for label, model in pair.items()}
        encoders = {label: query_encoder(model.path, shop.opened_store) for label, model in pair.items()}
        return {
            "queries": [_example(shop, table, row, types, items, titles, embeddings, encoders) for row in asked[:2]]
        }

    return shop.result("examples", pair, compute)


def _example(
    shop: Shop,
    table: Mapping[str, Any],
    row: int,
    types: Sequence[str],
    items: Mapping[str, Any],
    titles: Mapping[int, str],
    embeddings: Mapping[str, np.ndarray],
    encoders: Mapping[str, Any],
) -> Result:
    query, senses = table["query"][row], table["meanings"][row]
    names = shop.truth_table("meanings")
    row_of = {name: row for row, name in enumerate(names["meaning"])}
    called = [
        f"{names['type'][row_of[m]] or names['brand'][row_of[m]]} ({names['category'][row_of[m]]})" for m in senses
    ]
    order = np.argsort(-np.array(items["popularity"]), kind="stable").tolist()
    meaning = np.full(len(order), -1)
    for number, sense in enumerate(senses):
        meaning[[item in shop.meanings[sense] for item in items["item_id"]]] = number
    shown = [r for r in order if meaning[r] >= 0][:300]
    shown += [r for r in order if meaning[r] < 0 and items["type"][r] in types][:300]
    found: Result = {"query": query, "meanings": called, "models": {}}
    of_row = {r: place for place, r in enumerate(items["row"])}
    for label, matrix in embeddings.items():
        heads = encoders[label]([query], None)[0]  # [heads, dim]
        firsts = [[of_row[i] for i in np.argsort(-(matrix @ head), kind="stable")[:20].tolist()] for head in heads]
        rows = list(dict.fromkeys([*shown, *(r for first in firsts for r in first)]))
        place = {r: p for p, r in enumerate(rows)}
        found["models"][label] = {
            "points": _plane(matrix[[items["row"][r] for r in rows]], shop.seed),
            "meaning": meaning[rows].tolist(),
            "heads": [[place[r] for r in first] for first in firsts],
            "found": [
                [[titles[items["item_id"][r]], called[meaning[r]] if meaning[r] >= 0 else "neither"] for r in first[:5]]
                for first in firsts
            ],
            "counts": [np.bincount(meaning[first] + 1, minlength=len(senses) + 1).tolist() for first in firsts],
        }
    return found


def cases(shop: Shop, model: Artifact, count: int = 5) -> Result:
    """Table 1: good cases and failures, picked by a rule from the queries that are not in the log.

    The queries are those of which all words are synonyms (kind gap) and those that are misspelt (kind typo). A good
    case is a query whose first item is relevant; for gap, its title must share no token with the query. `count` good
    cases are drawn at random. A failure is a query whose first item is not relevant; the `count` failures with the
    worst rank of the first relevant item are returned.
    """

    def compute() -> Result:
        judgments = Judgments.read(
            shop.directory.path / "judgments.test.tsv", "query", "item", "grade", 1.0, slices=["kind"]
        )
        right_spelling = dict(
            zip(*(shop.truth_table("misspellings")[name] for name in ("query", "right")), strict=True)
        )
        titles = dict(zip(shop.opened_store.items()["id"].tolist(), shop.opened_store.titles(), strict=True))
        search, tokenize = exact_search(model.path, shop.opened_store), unigrams()
        found: Result = {}
        for kind in ("gap", "typo"):
            rows = [row for row, kinds in enumerate(judgments.slices["kind"]) if kinds == (kind,)]
            asked = judgments.take(rows)
            answers = search(asked.queries, None, len(titles))[0]
            good, bad = [], []
            for query, relevant, ids in zip(asked.queries, asked.relevant, answers, strict=True):
                ranks = np.flatnonzero(np.isin(ids, relevant)) + 1
                rank = int(ranks[0]) if len(ranks) else len(titles) + 1
                first = titles.get(int(ids[0]), "nothing")
                shares = bool(set(tokenize(query)) & set(tokenize(first)))
                case = {
                    "query": query,
                    "means": right_spelling.get(query, ""),
                    "item": first,
                    "right": titles[int(ids[rank - 1])] if rank <= len(titles) else titles[relevant[0]],
                    "rank": rank,
                }
                if rank > 1:
                    bad.append(case)
                elif kind == "typo" or not shares:
                    good.append(case)
            drawn = np.random.default_rng(shop.seed).permutation(len(good))[:count]
            bad.sort(key=lambda case: (-case["rank"], case["query"]))
            found[kind] = {
                "queries": len(rows),
                "good": len(good),
                "bad": len(bad),
                "good_cases": [good[place] for place in np.sort(drawn)],
                "bad_cases": bad[:count],
            }
        return found

    return shop.result("cases", {"model": model}, compute, count=count)


def projector(shop: Shop, model: Artifact) -> Result:
    """Writes the files for TensorBoard's embedding projector to projector/."""

    def compute() -> Result:
        _, items = _popular_types(shop, 1)
        embeddings = item_embeddings(model.path, shop.opened_store)
        titles = dict(zip(shop.opened_store.items()["id"].tolist(), shop.opened_store.titles(), strict=True))
        with new_directory(shop.runner.out / "projector", True, "projector files", "projector_config.pbtxt") as out:
            with (
                open(out / "vectors.tsv", "w") as vectors,
                open(out / "metadata.tsv", "w", encoding="utf-8") as metadata,
            ):
                metadata.write("title\ttype\tcategory\titem_id\n")
                columns = (items[name] for name in ("item_id", "type", "category", "row"))
                for item, of_type, category, row in zip(*columns, strict=True):
                    vectors.write("\t".join(f"{x:.6g}" for x in embeddings[row]) + "\n")
                    metadata.write(f"{titles[item]}\t{of_type}\t{category}\t{item}\n")
            (out / "projector_config.pbtxt").write_text(
                'embeddings {\n  tensor_name: "items"\n'
                '  tensor_path: "vectors.tsv"\n  metadata_path: "metadata.tsv"\n}\n'
            )
        return {"items": len(embeddings), "dim": embeddings.shape[1]}

    if not (shop.runner.out / "projector").is_dir():
        (shop.runner.out / "runs" / f"{shop.experiment_name('projector')}.json").unlink(missing_ok=True)
    return shop.result("projector", {"model": model}, compute)
