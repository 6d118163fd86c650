"""A small shop, trained, indexed and exported once for all tests of this folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from dpsr_tf.cli import main


@dataclasses.dataclass(frozen=True)
class Job:
    """Where each stage's output lies."""

    store: Path
    model: Path
    index: Path
    servable: Path


def dpsr(*arguments: object) -> None:
    """Runs a command that has to succeed."""
    assert main([str(argument) for argument in arguments]) == 0, arguments


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A generated shop of 400 items, 30 training steps, a Flat index, servable version 1."""
    root = tmp_path_factory.mktemp("job")
    result = Job(root / "store", root / "model", root / "index", root / "servable")
    small = ["train.steps=30", "train.batch_size=32", "model.embedding_dim=16", "model.token_dim=16", "serving.k=7"]
    dpsr("generate", f"--out={root / 'shop'}", "--items=400", "--users=20", "--interactions=2000")
    dpsr("ingest", f"--schema={root / 'shop' / 'schema.yaml'}", f"--out={result.store}")
    dpsr("train", f"--store={result.store}", f"--out={result.model}", *(f"--set={s}" for s in small))
    dpsr("index", f"--model={result.model}", f"--store={result.store}", f"--out={result.index}")
    dpsr("export", f"--model={result.model}", f"--index={result.index}", f"--out={result.servable}")
    return result
