"""A model with a click graph from training to servable: items with neighbourhoods, and the table of known queries."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import yaml

from dpsr_common import command_line
from dpsr_export.warmup import LoadedServable
from dpsr_tf.data.store import Store
from dpsr_tf.models.encoders import item_embeddings, query_encoder

pytestmark = pytest.mark.slow

SETTINGS = {
    "model.token_dim": 16,
    "model.embedding_dim": 8,
    "model.graph_fan_out": "[5, 3]",
    "train.batch_size": 16,
    "train.learning_rate": 0.1,
    "train.steps": 20,
}


def write(folder, log):
    items = [{"item": i, "title": f"item{i} word{i * 7 % 30}", "brand": f"b{i % 8}"} for i in range(64)]
    items.append({"item": 64, "title": "lonely thing", "brand": None})
    for name, rows in (("items", items), ("log", log)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    schema = {
        "items": {"files": "items.jsonl", "id": "item", "text": ["title"], "features": ["brand"]},
        "interactions": {"files": "log.jsonl", "query": "query", "item": "item"},
        "graph": {"attributes": ["brand"]},
        "vocabulary": {"min_count": 1},
    }
    (folder / "schema.yaml").write_text(yaml.safe_dump(schema))


def clicks(seed: int) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [{"query": f"Query{q} Red", "item": int(q % 8 + 8 * rng.integers(8))} for q in range(40) for _ in range(6)]


def run(*arguments: str) -> None:
    assert command_line.main(list(arguments)) == 0, arguments


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store, a model, its index and its servable; and a second store with other clicks, for the same model."""
    folder = tmp_path_factory.mktemp("graph")
    for name, seed in (("first", 1), ("second", 2)):
        (folder / name).mkdir()
        write(folder / name, clicks(seed))
    flags = [f"--set={key}={value}" for key, value in SETTINGS.items()]
    run("ingest", f"--schema={folder / 'first/schema.yaml'}", f"--out={folder / 'store'}")
    run("train", f"--store={folder / 'store'}", f"--out={folder / 'model'}", *flags)
    run("ingest", f"--schema={folder / 'second/schema.yaml'}", f"--like={folder / 'model'}", f"--out={folder / 'new'}")
    for store, index in (("store", "index"), ("new", "new_index")):
        run("index", f"--model={folder / 'model'}", f"--store={folder / store}", f"--out={folder / index}")
    run("export", f"--model={folder / 'model'}", f"--index={folder / 'index'}", f"--out={folder / 'servable'}")
    return folder


def embedded(servable, queries):
    return servable("query_embedding", {"query": np.array(queries, object)})["query_embedding"]


QUERIES = ["query7 RED", "Query7  red", "query7", "something else", "query11 red", ""]


def test_a_servable_embeds_queries_as_the_model_does(made):
    servable = LoadedServable(made / "servable" / "1")
    try:
        found = embedded(servable, QUERIES)
        one = embedded(servable, QUERIES[:1])
        answers = servable("serving_default", {"query": np.array(QUERIES, object)})
    finally:
        servable.close()
    expected = query_encoder(made / "model", Store(made / "store"))(QUERIES, None)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one[0], found[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[0], found[1])
    items = item_embeddings(made / "model", Store(made / "store"))
    best = (expected[0] @ items.T).argsort(axis=1)[0, ::-1][:5]
    assert answers["item_ids"][0, :5].tolist() == Store(made / "store").items()["id"][best].tolist()


def test_known_queries_differ_from_their_text_alone_and_others_do_not(made):
    model = query_encoder(made / "model", Store(made / "store"))(QUERIES, None)
    # A store of the same vocabulary whose graph knows other queries.
    other = query_encoder(made / "model", Store(made / "new"))(QUERIES, None)
    differs = np.abs(model - other).max(axis=(1, 2)) > 1e-4
    assert differs.tolist() == [True, True, False, False, True, False]


def test_manifests_say_what_the_table_covers(made):
    expected = {"queries": 40, "coverage": 1.0, "measured_on": "240 pairs of the log"}
    assert json.loads((made / "index" / "index.json").read_text())["graph"] == expected
    manifest = json.loads((made / "servable" / "1" / "assets.extra" / "dpsr_manifest.json").read_text())
    assert manifest["index"]["graph"] == expected


def test_an_item_without_edges_is_embedded_from_its_text(made):
    first, second = (item_embeddings(made / "model", Store(made / name)) for name in ("store", "new"))
    same = np.abs(first - second).max(axis=1) < 1e-6
    assert same[64] and not same[:64].all()


def test_index_only_renews_items_and_table(made, tmp_path):
    shutil.copytree(made / "servable", tmp_path / "servable")
    run("export", "--index_only", f"--index={made / 'new_index'}", f"--out={tmp_path / 'servable'}")
    servable = LoadedServable(tmp_path / "servable" / "2")
    try:
        found = embedded(servable, QUERIES)
    finally:
        servable.close()
    expected = query_encoder(made / "model", Store(made / "new"))(QUERIES, None)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_a_table_of_another_model_is_refused(made, tmp_path, capsys):
    flags = [f"--set={key}={value}" for key, value in SETTINGS.items()]
    run("train", f"--store={made / 'store'}", f"--out={tmp_path / 'model'}", *flags, "--set=train.steps=1")
    run("index", f"--model={tmp_path / 'model'}", f"--store={made / 'store'}", f"--out={tmp_path / 'index'}")
    shutil.copytree(made / "servable", tmp_path / "servable")
    # As part of another model's index.
    renew = ["export", "--index_only", f"--out={tmp_path / 'servable'}"]
    assert command_line.main([*renew, f"--index={tmp_path / 'index'}"]) == 1
    assert "so it is not of the model in" in capsys.readouterr().err
    # As a file put into the index or the servable by hand.
    shutil.copytree(made / "index", tmp_path / "mixed")
    shutil.copyfile(tmp_path / "index" / "query_graph.dpsr", tmp_path / "mixed" / "query_graph.dpsr")
    assert command_line.main([*renew, f"--index={tmp_path / 'mixed'}"]) == 1
    assert "query_graph.dpsr: sha256 is" in capsys.readouterr().err
    shutil.copyfile(
        tmp_path / "index" / "query_graph.dpsr", tmp_path / "servable" / "1" / "assets" / "query_graph.dpsr"
    )
    with pytest.raises(Exception, match=r"query_graph\.dpsr"):
        LoadedServable(tmp_path / "servable" / "1")


def test_the_table_has_the_most_frequent_queries(made, tmp_path):
    log = clicks(1) + [{"query": "Query3 Red", "item": 3}] * 5 + [{"query": "Query9 Red", "item": 9}] * 5
    (tmp_path / "raw").mkdir()
    write(tmp_path / "raw", log)
    like = f"--like={made / 'model'}"
    run("ingest", f"--schema={tmp_path / 'raw/schema.yaml'}", like, f"--out={tmp_path / 'store'}")
    run("index", f"--model={made / 'model'}", f"--store={tmp_path / 'store'}", f"--out={tmp_path / 'index'}",
        "--set=serving.graph_queries=2")  # fmt: skip
    graph = json.loads((tmp_path / "index" / "index.json").read_text())["graph"]
    assert graph["queries"] == 2 and graph["coverage"] == round(22 / 250, 6)
