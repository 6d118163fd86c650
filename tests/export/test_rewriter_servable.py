"""The servable of a rewriter: against its checkpoint and its table, renewal, a real server, and wrong use."""

from __future__ import annotations

import asyncio
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from rewriting_shops import rewriting_store, untrained_rewriter

from dpsr_common.command_line import main
from dpsr_export.rewrite import FORMAT, LIST, MANIFEST
from dpsr_export.rewriter import rewrite_inputs
from dpsr_export.warmup import LoadedServable
from dpsr_serving.client import AsyncSearchClient, SearchClient
from dpsr_serving.model_server import start_model_server
from dpsr_tf.data.store import Store
from dpsr_tf.models.rewriter_texts import rewriter

QUERIES = ["red drill", "手机 12mm", "cordless", "Straße  KIT", "zzz red", "blue blue blue shoes bit power"]
# What no model can say in other words: nothing, no words, too many words, and a script that the shop does not use.
UNREADABLE = ["", " \u3000", "?!", "red " * 7, "drill " * 5000, "ไทย", "red ไทย", "😀", "\x00"]


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def rewrites(servable: LoadedServable, queries: list[str], n: int = 3, seed: int = 0) -> list[list[tuple[str, float]]]:
    found = servable("rewrite", rewrite_inputs(queries, n, seed))
    assert found["rewrites"].shape == found["log_probabilities"].shape == (len(queries), n)
    return [
        [(text.decode(), float(score)) for text, score in zip(*row, strict=True) if text]
        for row in zip(found["rewrites"], found["log_probabilities"], strict=True)
    ]


class Made:
    """A shop, a rewriter of random weights, its table for some queries, and a servable of both, version 1."""

    def __init__(self, folder: Path):
        self.store: Store = rewriting_store(folder / "shop")
        self.model = folder / "model"
        untrained_rewriter(self.model, self.store)
        self.table, self.servable = folder / "table", folder / "servable"
        (folder / "queries.txt").write_text("red drill\nblue shoes\n\nzzz red\n", encoding="utf-8")
        (folder / "always.tsv").write_text("red drill\tred driver\nNew One\t手机壳\n", encoding="utf-8")
        (folder / "never.tsv").write_text("kit 21\tpower\n", encoding="utf-8")
        self.flags = [f"--model={self.model}", f"--store={self.store.path}"]
        self.lists = [f"--{name}={folder / name}.tsv" for name in ("always", "never")]
        assert run("rewrite", *self.flags, *self.lists, f"--queries={folder / 'queries.txt'}", f"--out={self.table}",
                   "--n=2") == 0  # fmt: skip
        assert run("export", f"--model={self.model}", f"--rewrites={self.table}", f"--out={self.servable}") == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("rewriter"))


@pytest.fixture(scope="module")
def loaded(made: Made) -> LoadedServable:
    return LoadedServable(made.servable / "1")


def test_known_queries_come_from_the_table_and_others_from_the_model(made: Made, loaded: LoadedServable) -> None:
    listed: dict[str, list[tuple[str, float]]] = {}
    for line in gzip.decompress((made.table / LIST).read_bytes()).decode().splitlines():
        query, text, score, _, _ = line.split("\t")
        listed.setdefault(query, []).append((text, float(score)))
    assert listed["red drill"][0] == ("red driver", 0.0) and listed["New One"][0] == ("手机壳", 0.0)
    # All of the table: of --queries and of both lists, also where the filters have left nothing.
    known = ["red drill", "New One", "blue shoes", "zzz red", "kit 21"]
    model = rewriter(made.model)
    assert model(["kit 21"], 3, 0) != [[]] and "kit 21" not in listed  # no rewrite keeps 21
    for query, found in zip(known, rewrites(loaded, [query.upper() for query in known]), strict=True):
        expected = listed.get(query, [])
        assert [text for text, _ in found] == [text for text, _ in expected]
        np.testing.assert_allclose([s for _, s in found], [s for _, s in expected], atol=1e-4)
    tail = ["手机 12mm", "cordless drill"]
    for found, decoded in zip(rewrites(loaded, tail), model(tail, 3, 0), strict=True):
        assert [text for text, _ in found] == [text for text, _ in decoded] != []
        np.testing.assert_allclose([s for _, s in found], [s for _, s in decoded], rtol=1e-4)
    assert rewrites(loaded, []) == [] and rewrites(loaded, ["red drill"], 1) == [[("red driver", 0.0)]]


def test_batches_do_not_matter(made: Made, loaded: LoadedServable) -> None:
    queries = [*QUERIES, "red drill", ""] * 3
    together = rewrites(loaded, queries)
    for query, found in zip(queries, together, strict=True):
        (alone,) = rewrites(loaded, [query])
        assert [text for text, _ in alone] == [text for text, _ in found]
    assert all(score <= 0 for row in together for _, score in row)
    default = loaded("serving_default", {"query": rewrite_inputs(["cordless"], 1)["query"]})
    assert default["rewrites"].shape == (1, 3)


def test_bad_input(loaded: LoadedServable) -> None:
    assert rewrites(loaded, UNREADABLE) == [[]] * len(UNREADABLE)
    # Memory grows with the bytes of a request, not with the number of queries times the longest one.
    assert rewrites(loaded, ["a" * 3_000_000, *["zzz"] * 30_000]) == [[]] * 30_001
    raw = rewrite_inputs([""] * 2, 3) | {"query": np.array([b"\xff\xfe", b"red \xff drill"], object)}
    assert loaded("rewrite", raw)["rewrites"].shape == (2, 3)
    for n in (0, -1, 11, 2**31 - 1):
        with pytest.raises(tf.errors.InvalidArgumentError, match=f"n is.*{n}.*expected 1 to 10"):
            rewrites(loaded, ["red"], n)
    assert len(rewrites(loaded, ["cordless"], 10)[0]) > 3


def test_the_graph_has_stock_ops_and_ours_and_defaults(made: Made) -> None:
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel.FromString((made.servable / "1" / "saved_model.pb").read_bytes())
    defaults = saved.meta_graphs[0].signature_def["rewrite"].defaults
    assert {name: tf.make_ndarray(value).item() for name, value in defaults.items()} == {"n": 3, "seed": 0}
    graph = saved.meta_graphs[0].graph_def
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    ours = {node.op for node in nodes if node.op.startswith("Dpsr")}
    assert ours <= {
        "DpsrFileFingerprint", "DpsrItemHistory", "DpsrItemIdsOfKeys", "DpsrItemKeysOfIds", "DpsrItemTableHandle",
        "DpsrItemTableLoad", "DpsrKeyTableHandle", "DpsrKeyTableLoad", "DpsrTokenizeStrings", "DpsrVocabularyHandle",
        "DpsrVocabularyLoad", "DpsrWordSequences",
    }  # fmt: skip
    assert not {node.op for node in nodes} & {"PyFunc", "EagerPyFunc", "PyFuncStateless"}


def test_sampling_and_a_new_table(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, model = tmp_path / "servable", f"--model={tmp_path / 'model'}"
    untrained_rewriter(tmp_path / "model", made.store, method="sampling")
    assert run("export", model, f"--out={base}", "--max_rewrites=4") == 0
    before = LoadedServable(base / "1")
    first, again, other = (rewrites(before, QUERIES, 4, seed) for seed in (1, 1, -7))
    assert first == again != other, "the seed alone chooses"
    alone = [rewrites(before, [query], 4, 1)[0] for query in QUERIES]
    assert [[text for text, _ in row] for row in alone] == [[text for text, _ in row] for row in first]

    (tmp_path / "always.tsv").write_text("cordless\tbattery driven\n")
    assert run("rewrite", model, f"--store={made.store.path}", "--max_queries=5", "--candidates=4", "--seed=3",
               f"--always={tmp_path / 'always.tsv'}", f"--out={tmp_path / 'table'}") == 0  # fmt: skip
    assert run("export", "--index_only", f"--rewrites={tmp_path / 'table'}", f"--out={base}") == 0
    assert f"servable {base / '2'}: 3 rewrites of a query of the table p50" in capsys.readouterr().out
    after = LoadedServable(base / "2")
    was, now = (rewrites(servable, ["cordless", "手机 12mm"]) for servable in (before, after))
    assert was[0][0][0] != "battery driven" == now[0][0][0]
    assert [text for text, _ in was[1]] == [text for text, _ in now[1]]
    manifests = [json.loads((base / name / "assets.extra" / "dpsr_manifest.json").read_text()) for name in ("1", "2")]
    assert manifests[0]["table"] is None and manifests[1]["table"]["queries"] == 6
    assert manifests[0]["kind"] == manifests[1]["kind"] == "rewriter"
    assert (base / "2" / "assets.extra" / "tf_serving_warmup_requests").stat().st_size
    for servable in (before, after):
        servable.close()


def test_a_changed_table_is_refused_at_load(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.servable / "1", tmp_path / "1")
    shutil.copyfile(made.store.path / "vocabulary.dpsr", tmp_path / "1" / "assets" / "rewrites.dpsr")
    with pytest.raises(Exception, match=r"rewrites\.dpsr"):
        LoadedServable(tmp_path / "1")


def test_wrong_use(made: Made, job: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged, other = (shutil.copytree(made.table, tmp_path / name) for name in ("damaged", "other"))
    about = json.loads((other / MANIFEST).read_text())
    (other / MANIFEST).write_text(json.dumps(about | {"checkpoint_fingerprint": "0" * 16}))
    (tmp_path / "both.tsv").write_text("red drill\tRED driver\n")
    out, model = f"--out={tmp_path / 'out'}", f"--model={made.model}"
    both = ["--always=" + str(tmp_path / "both.tsv"), "--never=" + str(tmp_path / "both.tsv")]
    retrieval, store = f"--model={job.model}", f"--store={made.store.path}"
    for arguments, status, message in (
        (("export", model, f"--rewrites={other}", out), 1, "another rewriter (fingerprint 0000000000000000)"),
        (("export", model, f"--rewrites={tmp_path}", out), 1, "holds no rewrites (no table.json); make one with"),
        (("export", model, f"--rewrites={made.table}", "--shards=2", out), 2, "--shards=2: cannot be combined"),
        (("export", model, f"--rewrites={made.table}", f"--index={job.index}", out), 2, "be combined with --index"),
        (("export", model, f"--index={job.index}", out), 1, "holds a model of kind rewriter, expected retrieval"),
        (("export", retrieval, f"--rewrites={made.table}", out), 1, "of kind retrieval, expected rewriter"),
        (("export", "--index_only", f"--rewrites={made.table}", f"--out={job.servable}"), 1, "is a retrieval servable"),
        (("rewrite", model, store), 2, "give --out (directory of the table to make) or --explain"),
        (("rewrite", model, store, out, "--explain=red"), 2, "give --out (directory of the table to make)"),
        (("rewrite", model, store, out, "--min_cosine=0.5"), 2, "--min_cosine=0.5: needs --towers"),
        (("rewrite", model, store, out, "--n=11"), 2, "--candidates=10: must be at least --n=11"),
        (("rewrite", model, store, out, "--n=0"), 2, "n"),
        (("rewrite", model, store, out, "--keep=colour"), 2, "no feature or filter 'colour'"),
        (("rewrite", model, store, out, f"--queries={tmp_path / 'none'}"), 1, "cannot be read: No such file"),
        (("rewrite", model, store, out, *both), 2, "is also in --never; remove one"),
        (("rewrite", retrieval, store, out), 1, "holds a model of kind retrieval, expected rewriter"),
        (("rewrite", model, store, out, f"--towers={job.model}"), 1, "holds a model of another vocabulary"),
    ):  # fmt: skip
        assert run(*arguments) == status, (arguments, capsys.readouterr().err)
        assert message in capsys.readouterr().err, arguments
        assert not (tmp_path / "out").exists()
    (damaged / "rewrites.dpsr").write_bytes(b"x" * 100)
    assert run("export", model, f"--rewrites={damaged}", out) == 1
    assert "bytes is 100, but table.json says" in capsys.readouterr().err
    (damaged / MANIFEST).write_text(json.dumps({"format": FORMAT, "version": 99}))
    assert run("export", model, f"--rewrites={damaged}", out) == 1
    assert "is of dpsr-rewrites version 99, expected dpsr-rewrites version 1" in capsys.readouterr().err


def test_explain(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("rewrite", *made.flags, *made.lists, "--explain=red drill", "--explain=ไทย", "--n=2") == 0
    shown = capsys.readouterr().out
    assert "  0.000                      red driver  [kept: of the list]" in shown
    assert "ไทย\n  the model writes nothing for it" in shown
    assert shown.count("\n  ") > 5 and shown.count("no items: its words match no other titles") > 1


def test_a_server_rewrites(made: Made, loaded: LoadedServable) -> None:
    queries = [*QUERIES, *UNREADABLE]
    expected = rewrites(loaded, queries, 2)
    with start_model_server(made.servable, "words") as server, SearchClient(server.target, "words") as client:
        found = client.rewrite(queries, 2)
        assert [[one.text for one in row] for row in found] == [[text for text, _ in row] for row in expected]
        assert client.rewrite("NEW one")[0][0].text == "手机壳"
        assert client.rewrite([b"\xff\xfe", b"red \xff"], 1)[0] == []
        with pytest.raises(ValueError, match=r"n is.*11.*expected 1 to 10, .*--max_rewrites"):
            client.rewrite("red", 11)
        with pytest.raises(ValueError, match="n must be a positive int32, got 0"):
            client.rewrite("red", 0)

        async def ask() -> list[Any]:
            async with AsyncSearchClient(server.target, "words") as other:
                return await asyncio.gather(*(other.rewrite(query, 2) for query in queries))

        alone = [row for (row,) in asyncio.run(ask())]
        assert [[one.text for one in row] for row in alone] == [[one.text for one in row] for row in found]
