"""The day after a training: new items and prices reach the server with the same model. And a shop without clicks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml

from dpsr_common.command_line import main
from dpsr_serving.client import SearchClient
from dpsr_tf.data.store import Store

NEW = [
    {"item_id": 1, "title": "Velora Glimmerstone Lantern Teal", "brand": "Brightfolk", "price": 777.0},
    {"item_id": 2, "title": "Velora Glimmerstone Candle", "brand": "Velora", "price": 12.0},
]


def dpsr(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0, arguments


@pytest.fixture(scope="module")
def day_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated shop, its store, and a personal model that reads features of items, indexed and exported."""
    root = tmp_path_factory.mktemp("day")
    dpsr("generate", f"--out={root / 'shop'}", "--items=300", "--users=20", "--interactions=2000")
    dpsr("ingest", f"--schema={root / 'shop' / 'schema.yaml'}", f"--out={root / 'store'}")
    towers = ["item_features=[brand, category, price]", "user_features=[gender, age]", "history_length=3"]
    sizes = ["train.steps=40", "train.batch_size=32", "model.embedding_dim=32", "model.token_dim=32"]
    settings = [f"--set={setting}" for setting in [*sizes, *(f"model.{setting}" for setting in towers)]]
    dpsr("train", f"--store={root / 'store'}", f"--out={root / 'model'}", *settings)
    dpsr("index", f"--model={root / 'model'}", f"--store={root / 'store'}", f"--out={root / 'index'}")
    dpsr("export", f"--model={root / 'model'}", f"--index={root / 'index'}", f"--out={root / 'servable'}")
    return root


@pytest.fixture
def server(day_one: Path) -> Iterator[str]:
    """The address of a model server on the servable of `day_one`, which looks for new versions every second."""
    log = day_one / "server.log"
    flags = ["--model_name=shop", "--port=0", "--file_system_poll_wait_seconds=1"]
    command = [sys.executable, "-m", "dpsr_common", "serve", f"--model_base_path={day_one / 'servable'}", *flags]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 60
        while not (found := re.search(r"Running gRPC ModelServer at (\S+)", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield found[1]
    finally:
        process.kill()
        process.wait()


def change_items(shop: Path) -> int:
    """Adds NEW to the item table and makes the first item dear. Returns the id of that item."""
    path = shop / "items.parquet"
    table = pyarrow.parquet.read_table(path)
    rows = table.to_pylist()
    rows[0]["price"] = 4999.0
    rows += [{**rows[1], **item} for item in NEW]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, table.schema), path)
    return int(rows[0]["item_id"])


@pytest.mark.slow
def test_new_items_and_prices_reach_the_server(day_one: Path, server: str, tmp_path: Path) -> None:
    model, store, index = day_one / "model", tmp_path / "store", tmp_path / "index"
    dear = change_items(day_one / "shop")
    schema = f"--schema={day_one / 'shop' / 'schema.yaml'}"
    dpsr("ingest", schema, "--items_only", f"--like={model}", f"--out={store}")
    opened = Store(store)
    assert opened.manifest["like"] == str(model) and opened.counts.queries == opened.counts.positives == 0
    assert opened.vocabulary.fingerprint == Store(day_one / "store").vocabulary.fingerprint
    dpsr("index", f"--model={model}", f"--store={store}", f"--out={index}")
    with SearchClient(server, "shop") as client:
        before = client.search(["glimmerstone lantern"], k=20)
        assert not {1, 2} & set(before[0].item_ids)
        dpsr("export", "--index_only", f"--index={index}", f"--out={day_one / 'servable'}")
        deadline = time.monotonic() + 60
        while client.search(["shoes"], k=1)[0].version != 2:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        after = client.search(["glimmerstone lantern"], k=5)[0]
        assert set(after.item_ids[:2].tolist()) == {1, 2}, after
        assert dear in client.search(["shoes"], k=300, filters={"price": (4998, None)})[0].item_ids
        (of_brand,) = client.search(["glimmerstone"], k=5, filters={"brand": "Brightfolk"})
        assert of_brand.item_ids.tolist() == [1], "a new value of a filter needs no new model"


@pytest.mark.slow
def test_a_store_of_the_next_day_is_measured_with_the_old_model(day_one: Path, tmp_path: Path) -> None:
    """With a log, the frozen codes serve for evaluation too; another vocabulary is refused, with what to do."""
    store = tmp_path / "store"
    schema = f"--schema={day_one / 'shop' / 'schema.yaml'}"
    change_items(day_one / "shop")
    dpsr("ingest", schema, f"--like={day_one / 'model'}", f"--out={store}")
    judged = f"--judgments={day_one / 'shop' / 'judgments.dev.tsv'}"
    dpsr("evaluate", f"--store={store}", judged, f"--system=model:{day_one / 'model'}", "--bootstrap=0")


@pytest.mark.slow
def test_a_first_day_without_clicks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A catalogue alone: a model of its titles finds items by other words and misspelt ones, up to the servable."""
    dpsr("generate", f"--out={tmp_path / 'shop'}", "--items=400", "--users=20", "--interactions=500")
    schema = yaml.safe_load((tmp_path / "shop" / "schema.yaml").read_text())
    del schema["interactions"], schema["users"]
    (tmp_path / "shop" / "catalogue.yaml").write_text(yaml.safe_dump(schema))
    dpsr("ingest", f"--schema={tmp_path / 'shop' / 'catalogue.yaml'}", f"--out={tmp_path / 'store'}")
    flags = [f"--store={tmp_path / 'store'}", f"--out={tmp_path / 'model'}"]
    capfd.readouterr()
    assert main(["train", *flags]) == 1
    assert "--config=dpsr_tf/configs/catalogue.yaml" in capfd.readouterr().err
    small = ["--set=train.steps=60", "--set=model.token_dim=64", "--set=model.embedding_dim=64"]
    dpsr("train", *flags, "--config=dpsr_tf/configs/catalogue.yaml", *small)
    dpsr("index", f"--model={tmp_path / 'model'}", f"--store={tmp_path / 'store'}", f"--out={tmp_path / 'index'}")
    dpsr(
        "export",
        f"--model={tmp_path / 'model'}",
        f"--index={tmp_path / 'index'}",
        f"--out={tmp_path / 'servable'}",
    )
    report = tmp_path / "figures.json"
    judged = f"--judgments={tmp_path / 'shop' / 'judgments.dev.tsv'}"
    systems = ["--system=bm25", f"--system=servable:{tmp_path / 'servable'}"]
    dpsr("evaluate", f"--store={tmp_path / 'store'}", judged, *systems, "--slice=kind", f"--json={report}")
    misspelt = json.loads(report.read_text())["slices"]["kind"]["typo"]["systems"]
    assert misspelt[f"servable:{tmp_path / 'servable'}"]["recall@10"] > misspelt["bm25"]["recall@10"]
