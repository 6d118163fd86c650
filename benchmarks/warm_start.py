"""Measures what a warm start saves: recall against training steps, from nothing and from the model of the day before.

    python benchmarks/warm_start.py [--seeds=1,2] [--steps=2000] [--out=DIR] --json

The log is that of a generated shop of two days (20,000 items, 500 types, 100,000 clicks). The first day lacks a tenth
of the items with their clicks, so that the second day brings new items, tokens and clicks. A model is trained on
the first day. Then models are trained on both days, `store-2`: from nothing, and from the first model, with AdaGrad's
sums kept or reset. Each is measured at several numbers of steps on queries that the log does not hold.
`--warm_start_sums` was chosen on the fold dev. Nothing was chosen on the fold test.

The bar `warm_fifth_to_scratch` is recall@100 of the warm start after a fifth of the steps, divided by that of the
training from nothing after all steps, on test, averaged over the seeds. Models and figures in `--out` are kept. A seed
takes some 5 minutes on 2 cores.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
import report
from absl import app, flags

from dpsr_tf.config import CONFIGS
from dpsr_tf.shop.log import START

METRICS = ("recall@10", "recall@100")
# Shares of --steps at which models are measured.
SHARES = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)
SHOP = ("--items=20000", "--types=500", "--users=2000", "--interactions=100000", "--set=days=2")
HARD = ("--set=titled_synonyms=0.02", "--set=rare_synonyms=0.5", "--set=unasked_synonyms=0.5")


def dpsr(*arguments: str) -> None:
    """Runs a command. Raises RuntimeError with its output if it fails."""
    run = subprocess.run([sys.executable, "-m", "dpsr_common", *arguments], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"dpsr {' '.join(arguments)}: {run.stdout}{run.stderr}")


def make_stores(folder: Path, seed: int) -> None:
    """Writes the shop and its two stores, `store-1` of the first day without a tenth of the items, and `store-2`."""
    if (folder / "store-2").exists():
        return
    shop = folder / "shop"
    dpsr("generate", f"--out={shop}", f"--seed={seed}", *SHOP, *HARD, "--overwrite")
    first = folder / "first"
    (first / "interactions").mkdir(parents=True, exist_ok=True)
    items = pyarrow.parquet.read_table(shop / "items.parquet")
    old = items.filter(pa.array(np.random.default_rng(seed).random(len(items)) >= 0.1))
    pyarrow.parquet.write_table(old, first / "items.parquet")
    log = pyarrow.parquet.read_table(shop / "interactions")
    is_first = pc.and_(pc.less(log["time"], START + 86_400), pc.is_in(log["item_id"], old["item_id"]))
    pyarrow.parquet.write_table(log.filter(is_first), first / "interactions" / "part-0.parquet")
    for name in ("users.parquet", "schema.yaml"):
        (first / name).write_bytes((shop / name).read_bytes())
    for number, tables in (("1", first), ("2", shop)):
        dpsr("ingest", f"--schema={tables / 'schema.yaml'}", f"--out={folder / f'store-{number}'}", "--overwrite",
             "--max_reject_fraction=1")  # fmt: skip


def train(folder: Path, name: str, store: str, seed: int, steps: int, *more: str) -> None:
    """Trains a model, or trains it on, to a number of steps."""
    dpsr("train", f"--store={folder / store}", f"--config={CONFIGS / 'shop.yaml'}", f"--out={folder / name}",
         f"--set=train.steps={steps}", f"--set=train.seed={seed}", *more)  # fmt: skip


def figures(folder: Path, names: list[str], fold: str) -> dict[str, dict[str, tuple[float, list[float]]]]:
    """Measures models on a fold of judged queries. Returns model -> metric -> value and its 95 % interval."""
    file = folder / "figures.json"
    systems = [f"--system=model:{folder / name}" for name in names]
    dpsr("evaluate", f"--store={folder / 'store-2'}", f"--judgments={folder / 'shop' / f'judgments.{fold}.tsv'}",
         *systems, "--latency_queries=0", f"--json={file}")  # fmt: skip
    found = json.loads(file.read_text())
    means, limits = (
        {name: found[part][f"model:{folder / name}"] for name in names} for part in ("systems", "intervals")
    )
    return {name: {metric: (means[name][metric], limits[name][metric]) for metric in METRICS} for name in names}


def curves(folder: Path, seed: int, steps: int) -> dict[str, dict[int, Path]]:
    """Trains all models, each on and on. Returns variant -> number of steps -> copy of the model at that step."""
    train(folder, "first", "store-1", seed, steps)
    warm = f"--warm_start={folder / 'first'}"
    variants = {
        "from nothing": [],
        "warm, sums kept": [warm, "--warm_start_sums=keep"],
        "warm, sums reset": [warm, "--warm_start_sums=reset"],
    }
    found: dict[str, dict[int, Path]] = {}
    for number, (variant, more) in enumerate(variants.items()):
        for share in SHARES:
            done = max(1, round(share * steps))
            copy = folder / f"model-{number}-{done}"
            found.setdefault(variant, {})[done] = copy
            if copy.exists():
                continue
            train(folder, f"model-{number}", "store-2", seed, done, *more)
            shutil.copytree(folder / f"model-{number}", copy, dirs_exist_ok=True)
    return found


def measure(result: report.Report, seeds: list[int], steps: int, out: Path) -> None:
    """Adds the curves, which are means over the seeds, and the bar."""
    found: dict[tuple[str, str, int, str], list[tuple[float, list[float]]]] = {}
    for seed in seeds:
        folder = out / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        make_stores(folder, seed)
        models = curves(folder, seed, steps)
        names = [path.name for of_variant in models.values() for path in of_variant.values()]
        for fold in ("dev", "test"):
            values = figures(folder, names, fold)
            for variant, of_variant in models.items():
                for done, path in of_variant.items():
                    for metric in METRICS:
                        key = (variant, fold, done, metric)
                        found.setdefault(key, []).append(values[path.name][metric])
    for (variant, fold, done, metric), of_seeds in found.items():
        low, high = of_seeds[0][1]
        note = f"95 % interval of seed {seeds[0]}: {low:.3f} to {high:.3f}"
        mean = statistics.fmean(value for value, _ in of_seeds)
        more = {"values": [value for value, _ in of_seeds], "interval": [low, high], "note": note}
        result.add(variant, f"{fold}, {done} steps", metric, mean, "", **more)
    fifth = result.value("warm, sums kept", f"test, {max(1, round(0.2 * steps))} steps", "recall@100")
    result.bars["warm_fifth_to_scratch"] = fifth / result.value("from nothing", f"test, {steps} steps", "recall@100")


def main(arguments: list[str]) -> None:
    """Runs the benchmark."""
    values = flags.FLAGS
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}")
    seeds = report.read_seeds(values.seeds)
    result = report.Report("warm_start", seeds[0], report.hardware("tensorflow", "numpy"))
    with tempfile.TemporaryDirectory() as temporary:
        measure(result, seeds, values.steps, Path(values.out or temporary))
    result.print(values.json)


if __name__ == "__main__":
    flags.DEFINE_list("seeds", ["1", "2"], "seeds of the shops and the trainings, separated by commas")
    flags.DEFINE_integer("steps", 2000, "number of steps of the training from nothing", 10)
    flags.DEFINE_string("out", None, "directory for stores and models (default: a temporary directory)")
    flags.DEFINE_boolean("json", False, "prints the results as one JSON object on the last line")
    app.run(main)
