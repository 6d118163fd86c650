"""The parts of benchmarks/quality.py that need neither data sets nor training."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from dpsr_tf.config import load_config
from dpsr_tf.training.train import config_from_flags

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "quality.py"
sys.path.append(str(SCRIPT.parent))
benchmark = importlib.import_module("quality")


def test_every_model_has_a_config_that_its_changes_fit():

    for model in (*benchmark.HOMEDEPOT_MODELS, *benchmark.MOVIELENS_MODELS, benchmark.CATALOGUE_MODEL):
        path = benchmark.CONFIGS / f"{model.config}.yaml"
        changes = [change.removeprefix("--set=") for change in model.changes]
        assert (config_from_flags(str(path), changes) == load_config(path)) == (not changes)


def test_folds_of_home_depot(tmp_path):
    for name in ("judgments.dev.tsv", "judgments.misspelt_dev.tsv", "spelling.misspelt_dev.tsv"):
        (tmp_path / name).touch()
    dev, typed, corrected = benchmark.homedepot_folds(tmp_path)
    assert f"--judgments={tmp_path / 'judgments.dev.tsv'}" in dev.flags and "--relevant_from=2.33" in dev.flags
    assert f"--judgments={tmp_path / 'judgments.misspelt_dev.tsv'}" in typed.flags
    assert set(corrected.flags) - set(typed.flags) == {
        f"--queries={tmp_path / 'spelling.misspelt_dev.tsv'}",
        "--key_column=query",
        "--ask_column=corrected",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no data set is given; expected some of --homedepot, --movielens, --esci"),
        (["--movielens=x", "--seeds=1,b"], "--seeds=1,b: expected whole numbers, as in --seeds=1,2"),
        (["--homedepot=none"], "--homedepot=none: has no judgments.dev.tsv, judgments.misspelt_dev.tsv, spelling"),
        (["--movielens=none", "more"], "unexpected argument 'more'"),
    ],
)
def test_bad_arguments(arguments, message):
    run = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert run.returncode != 0 and message in run.stdout + run.stderr
