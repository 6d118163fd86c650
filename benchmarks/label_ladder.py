"""Measures what a ladder of orders, carts, clicks, unclicked and random items brings to retrieval.

    python benchmarks/label_ladder.py [--seeds=1,2,3] [--steps=1000] [--out=DIR] --json

For each seed it generates a shop, and trains models that differ in `train.type_weights`, `train.type_margins` and
`train.num_own_negatives` only. They read text, item features and the profile of the user. Each is measured on purchases
after the end of the log. The value of a row is the mean over the seeds. `difference` is to the row that the note names,
with the smallest lower and the largest upper bound of the seeds' 95 % intervals, paired over the same purchases.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import report
from absl import app, flags

from dpsr_tf.config import CONFIGS

METRICS = ("recall@10", "recall@100", "ndcg@10")
SHOP = ("--items=6000", "--users=1000", "--interactions=60000", "--set=personal_judgments=3000")
TRAINING = ("model.hidden=[]", "train.batch_size=256", "train.learning_rate=0.05", "train.initial_accumulator=1e-6")
SOFTMAX = ("train.loss=softmax", "train.log_q_correction=true", "train.num_random_negatives=256")
HINGE = ("train.margin=0.1",)
OWN = "train.num_own_negatives=4"
UP = "{cart: 2, order: 4}"
# Loss -> variant -> settings. The first variant of a loss is the one that the others are compared with.
VARIANTS: dict[str, dict[str, tuple[str, ...]]] = {
    "softmax": {
        "no ladder": SOFTMAX,
        "order 4, cart 2": (*SOFTMAX, f"train.type_weights={UP}"),
        "unclicked below": (*SOFTMAX, OWN),
        "unclicked between": (*SOFTMAX, OWN, "train.type_weights={unclicked: 0.1}"),
        "unclicked between, order 4, cart 2": (*SOFTMAX, OWN, "train.type_weights={unclicked: 0.1, cart: 2, order: 4}"),
        "unclicked above random only": (
            *SOFTMAX, OWN, "train.own_negative_weight=0", "train.type_weights={unclicked: 0.1}",
        ),
    },
    "hinge": {
        "no ladder": HINGE,
        "order 4, cart 2": (*HINGE, f"train.type_weights={UP}"),
        "margins of order 0.2, cart 0.15": (*HINGE, "train.type_margins={cart: 0.15, order: 0.2}"),
        "unclicked below": (*HINGE, OWN),
        "unclicked between": (
            *HINGE, OWN, "train.type_margins={unclicked: 0.05}", "train.type_weights={unclicked: 0.1}",
        ),
    },
}  # fmt: skip


def dpsr(*arguments: str) -> None:
    """Runs a command. Raises RuntimeError with its output if it fails."""
    run = subprocess.run([sys.executable, "-m", "dpsr_common", *arguments], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"dpsr {' '.join(arguments)}: {run.stdout}{run.stderr[-2000:]}")


def figures(folder: Path, loss: str, seed: int, steps: int) -> dict[str, Any]:
    """Trains the variants of a loss, and returns what `dpsr evaluate` writes about them."""
    shop, store = folder / "shop", folder / "store"
    if not store.exists():
        dpsr("generate", f"--out={shop}", f"--seed={seed}", *SHOP, "--overwrite")
        dpsr("ingest", f"--schema={shop / 'schema.yaml'}", f"--out={store}")
    systems = []
    for number, settings in enumerate(VARIANTS[loss].values()):
        model = folder / f"{loss}-{number}"
        sets = [*TRAINING, *settings, f"train.steps={steps}", f"train.checkpoint_steps={steps}", f"train.seed={seed}"]
        dpsr("train", f"--store={store}", f"--config={CONFIGS / 'dpsr_p.yaml'}", f"--out={model}",
             *(f"--set={setting}" for setting in sets))  # fmt: skip
        systems.append(f"--system=model:{model}")
    file = folder / f"{loss}.json"
    dpsr("evaluate", f"--store={store}", f"--judgments={shop / 'judgments.personal.tsv'}", "--user_column=user_id",
         "--time_column=time", *systems, "--compare", "--latency_queries=0", f"--json={file}")  # fmt: skip
    return dict(json.loads(file.read_text()))


def measure(result: report.Report, seeds: list[int], steps: int, out: Path) -> None:
    """Adds a row for each variant and metric."""
    for loss, variants in VARIANTS.items():
        found = []
        for seed in seeds:
            folder = out / f"seed-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            found.append((figures(folder, loss, seed, steps), folder))
        for number, variant in enumerate(variants):
            for metric in METRICS:
                values = [
                    of_seed["systems"][f"model:{folder / f'{loss}-{number}'}"][metric] for of_seed, folder in found
                ]
                more: dict[str, Any] = {"values": values}
                if number:
                    differences = [of_seed["comparisons"][number - 1]["figures"][metric] for of_seed, _ in found]
                    more["difference"] = statistics.fmean(d["difference"] for d in differences)
                    low = min(d["interval"][0] for d in differences)
                    high = max(d["interval"][1] for d in differences)
                    more["interval"] = [low, high]
                    more["note"] = f"{more['difference']:+.4f} ({low:+.4f} to {high:+.4f}) to {next(iter(variants))}"
                result.add(f"{loss}, {variant}", "purchases", metric, statistics.fmean(values), "", **more)


def main(arguments: list[str]) -> None:
    """Runs the benchmark."""
    values = flags.FLAGS
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected argument {arguments[1]!r}")
    seeds = report.read_seeds(values.seeds)
    result = report.Report("label_ladder", seeds[0], report.hardware("tensorflow", "numpy"))
    with tempfile.TemporaryDirectory() as temporary:
        measure(result, seeds, values.steps, Path(values.out or temporary))
    result.print(values.json)


if __name__ == "__main__":
    flags.DEFINE_list("seeds", ["1", "2", "3"], "seeds of the shops and the trainings, separated by commas")
    flags.DEFINE_integer("steps", 1000, "number of training steps of each model", 10)
    flags.DEFINE_string("out", None, "directory for stores and models (default: a temporary directory)")
    flags.DEFINE_boolean("json", False, "prints the results as one JSON object on the last line")
    app.run(main)
