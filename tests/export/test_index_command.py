"""`dpsr index` with approximate indexes: files it keeps and reuses, reports, errors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import faiss
import numpy as np
import pytest
import tensorflow as tf
from conftest import Job, dpsr
from object_stores import BUCKET, s3_server

from dpsr_common.command_line import main
from dpsr_common.errors import CommandError
from dpsr_common.packed_file import PackedFile
from dpsr_export import embeddings
from dpsr_export.embeddings import ItemEmbeddings, embed_items, kept_embeddings, sample_queries
from dpsr_tf.data.store import Store
from dpsr_tf.evaluation.corpus import Corpus
from dpsr_tf.evaluation.retriever import Retriever, ask
from dpsr_tf.evaluation.systems import Systems
from dpsr_tf.models.encoders import exact_search, item_encoder
from dpsr_tf.models.model_directory import ModelDirectory

pytestmark = pytest.mark.slow


def retriever(kind: str, directory: str, store: Store) -> Retriever:
    """Makes the system of `dpsr evaluate --system=KIND:DIR`."""
    return Systems(Corpus.of_store(store)).make(f"{kind}:{directory}")


def index_arguments(job: Job, out: Path, *more: str) -> list[str]:
    return ["index", f"--model={job.model}", f"--store={job.store}", f"--out={out}", *more]


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".")]


def test_report_choice_and_servable_agree(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "index"
    dpsr(*index_arguments(job, out, "--set=index.factory=IVF16,Flat", "--set=index.recall_target=0.9"))
    manifest, report = (json.loads((out / name).read_text()) for name in ("index.json", "recall.json"))
    assert "<svg" in (out / "recall.svg").read_text() and not hidden(tmp_path)
    # The report, computed anew from the embeddings.
    model, store = ModelDirectory.open(job.model), Store(job.store)
    queries, _ = sample_queries(model, store, str(job.model / manifest["checkpoint"]), 1000)
    vectors = ItemEmbeddings(out / "item_embeddings.dpsr", 16).vectors
    scores = queries @ vectors.T
    index = faiss.read_index(str(out / "items.faiss"))
    for setting in report["settings"]:
        faiss.ParameterSpace().set_index_parameters(index, setting["parameters"])
        for k in (7, 10, 100, 1000):
            at = min(k, 400)
            found = index.search(queries, at)[1]
            floors = -np.partition(-scores, at - 1, axis=1)[:, at - 1]
            right = (np.take_along_axis(scores, found, axis=1) >= floors[:, None] - 1e-6) & (found >= 0)
            assert setting[f"ann_recall@{k}"] == pytest.approx(right.mean(), abs=1e-4)
    good = [setting for setting in report["settings"] if setting["ann_recall@7"] >= 0.9]
    cheapest = min(good, key=lambda setting: setting["p50_ms"])
    assert manifest["parameters"] == report["chosen"] == cheapest["parameters"] != ""
    assert manifest["ann_recall@100"] == cheapest["ann_recall@100"]
    dpsr("export", f"--model={job.model}", f"--index={out}", f"--out={tmp_path / 'servable'}")
    held = json.loads((tmp_path / "servable" / "1" / "assets.extra" / "dpsr_manifest.json").read_text())["index"]
    assert held["parameters"] == cheapest["parameters"] and held["factory"] == "IVF16,Flat"


def test_refused_recall_leaves_no_index_and_keeps_the_embeddings(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "index"
    flags = ["--set=index.factory=IVF16,Flat", "--set=index.parameters=nprobe=1", "--min_ann_recall=0.999"]
    assert main(index_arguments(job, out, *flags)) == 1
    error = capsys.readouterr().err
    assert "ann_recall@7 of IVF16,Flat is 0." in error and "below --min_ann_recall=0.999" in error
    assert [path.name[:18] for path in tmp_path.iterdir()] == [".index.embeddings-"]
    monkeypatch.setattr(embeddings, "item_encoder", None)  # must not be asked again
    dpsr(*index_arguments(job, out, "--min_ann_recall=1"))
    assert [path.name for path in tmp_path.iterdir()] == ["index"]
    dpsr(*index_arguments(job, out, "--overwrite", "--set=index.factory=HNSW8"))  # nor for another index in its place
    assert json.loads((out / "index.json").read_text())["factory"] == "HNSW8"
    np.testing.assert_array_equal(
        PackedFile(out / "item_embeddings.dpsr")["embedding"],
        PackedFile(job.index / "item_embeddings.dpsr")["embedding"],
    )


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--set=index.factory=Flatt", "index.factory 'Flatt'"),
        ("--set=index.parameters=nprobe=3", "index.parameters 'nprobe=3'"),
        ("--set=index.factory=auto --set=index.memory=1e-9", "index.memory is 1e-09 GB"),
        ("--set=index.recall_target=2", "recall_target is 2"),
        ("--min_ann_recall=2", "min_ann_recall"),
        ("--device=tpu", "device"),
        ("--device=gpu", "--device=gpu: the installed FAISS does not support GPUs; install faiss-gpu"),
    ],
)
def test_what_is_refused(
    job: Job,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    flag: str,
    message: str,
) -> None:
    monkeypatch.delattr(faiss, "StandardGpuResources", raising=False)  # of a faiss-gpu, if that is what is installed
    assert main(index_arguments(job, tmp_path / "index", *flag.split())) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1, error
    assert not (tmp_path / "index").exists()


class Killed(Exception):
    """Stands for the end of the process."""


def encoder(change: Callable[[np.ndarray, np.ndarray], None]) -> Callable:
    """The real item tower, with its output changed."""

    def make(model: ModelDirectory, store: Store, checkpoint: str) -> Callable[[np.ndarray], np.ndarray]:
        encode = item_encoder(model, store, checkpoint)

        def changed(rows: np.ndarray) -> np.ndarray:
            found = encode(rows)
            change(rows, found)
            return found

        return changed

    return make


def test_a_killed_run_goes_on(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, store = ModelDirectory.open(job.model), Store(job.store)
    checkpoint = tf.train.latest_checkpoint(str(job.model))
    monkeypatch.setattr(embeddings, "CHUNK", 64)

    def die(rows: np.ndarray, found: np.ndarray) -> None:
        if rows[-1] >= 256:
            raise Killed

    asked: list[int] = []
    monkeypatch.setattr(embeddings, "item_encoder", encoder(die))
    with pytest.raises(Killed):
        embed_items(model, store, checkpoint, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"chunk-{b:012}.dpsr" for b in (0, 64, 128, 192)]
    damaged = tmp_path / f"chunk-{64:012}.dpsr"
    damaged.write_bytes(damaged.read_bytes()[:-8])
    monkeypatch.setattr(embeddings, "item_encoder", encoder(lambda rows, found: asked.extend(rows)))
    path = embed_items(model, store, checkpoint, tmp_path)
    assert set(asked) == {*range(64, 128), *range(256, 400)}
    assert path.read_bytes() == (job.index / "item_embeddings.dpsr").read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["item_embeddings.dpsr"]


@pytest.mark.slow
def test_spark_embeds_the_same(job: Job, tmp_path: Path) -> None:
    dpsr(*index_arguments(job, tmp_path / "index", "--engine=spark", "--spark_master=local[1]"))
    for name in ("item_embeddings.dpsr", "items.faiss", "item_ids.dpsr"):
        assert (tmp_path / "index" / name).read_bytes() == (job.index / name).read_bytes()
    assert not hidden(tmp_path)


def test_model_and_store_in_an_object_store(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPSR_CACHE", str(tmp_path / "cache"))
    with s3_server():
        dpsr("copy", f"--from={job.model}", f"--to={BUCKET}/model")
        dpsr("copy", f"--from={job.store}", f"--to={BUCKET}/store")
        out = tmp_path / "index"
        dpsr("index", f"--model={BUCKET}/model", f"--store={BUCKET}/store", f"--out={out}")
    for name in ("item_embeddings.dpsr", "items.faiss", "item_ids.dpsr"):
        assert (out / name).read_bytes() == (job.index / name).read_bytes()


def test_embeddings_of_another_source_are_never_used(job: Job, tmp_path: Path) -> None:
    out, other = tmp_path / "index", tmp_path / f".index.embeddings-{'0' * 16}"
    other.mkdir()
    (other / "item_embeddings.dpsr").write_bytes(b"stale")
    dpsr(*index_arguments(job, out))
    assert not hidden(tmp_path)
    with kept_embeddings(out, "1" * 16) as work:
        assert not any(work.iterdir())
    with kept_embeddings(out, json.loads((out / "index.json").read_text())["embeddings_source"]) as work:
        assert [path.name for path in work.iterdir()] == ["item_embeddings.dpsr"]


@pytest.mark.parametrize("source", ["1" * 16, "2" * 16])
def test_two_runs_with_one_out_at_once(source: str, tmp_path: Path) -> None:
    """The second one ends, also if it has another model or store, and the first one keeps its embeddings."""
    out = tmp_path / "index"
    with kept_embeddings(out, "1" * 16) as work:
        (work / "chunk").write_bytes(b"made")
        with (
            pytest.raises(CommandError, match=f"^{re.escape(str(out))}: another `dpsr index` makes this index"),
            kept_embeddings(out, source),
        ):
            pass
        assert [path.name for path in tmp_path.iterdir()] == [work.name] and (work / "chunk").exists()
    assert not any(tmp_path.iterdir())


def test_items_without_a_vector_are_left_out_and_counted(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def spoil(rows: np.ndarray, found: np.ndarray) -> None:
        found[np.isin(rows, [0, 5, 399])] = 0
        found[rows == 17, 3] = np.nan

    monkeypatch.setattr(embeddings, "item_encoder", encoder(spoil))
    dpsr(*index_arguments(job, tmp_path / "index"))
    assert (
        "3 items not indexed (no known token), 1 items not indexed (embedding is NaN or infinite)"
        in capsys.readouterr().out
    )
    manifest = json.loads((tmp_path / "index" / "index.json").read_text())
    assert (manifest["items"], manifest["empty_items"], manifest["not_finite_items"]) == (396, 3, 1)
    ids = Store(job.store).items()["id"]
    left = np.delete(ids, [0, 5, 17, 399])
    np.testing.assert_array_equal(PackedFile(tmp_path / "index" / "item_ids.dpsr")["id"], left)
    found = retriever("index", str(tmp_path / "index"), Store(job.store))(["phone case"], None, 400)[0][0]
    assert sorted(found[found >= 0].tolist()) == left.tolist()

    monkeypatch.setattr(embeddings, "item_encoder", encoder(lambda rows, found: found.fill(np.nan)))
    with pytest.raises(CommandError, match="400 of 400 item embeddings hold a NaN or an infinity"):
        embed_items(
            ModelDirectory.open(job.model), Store(job.store), tf.train.latest_checkpoint(str(job.model)), tmp_path
        )


def test_export_refuses_a_changed_file_and_a_retrained_checkpoint(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    index = tmp_path / "index"
    shutil.copytree(job.index, index)
    data = bytearray((index / "items.faiss").read_bytes())
    data[-1] ^= 1
    (index / "items.faiss").write_bytes(data)
    arguments = ["export", f"--model={job.model}", f"--index={index}", f"--out={tmp_path / 'servable'}"]
    assert main(arguments) == 1
    assert "items.faiss: sha256 is" in capsys.readouterr().err
    shutil.rmtree(index)
    shutil.copytree(job.index, index)
    manifest = json.loads((index / "index.json").read_text())
    (index / "index.json").write_text(json.dumps({**manifest, "checkpoint_fingerprint": "0" * 16}))
    assert main(arguments) == 1
    assert "was made from another model.ckpt-30" in capsys.readouterr().err
    assert not (tmp_path / "servable").exists()


def test_a_model_that_reads_features(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    values = ["train.steps=10", "train.batch_size=32", "model.embedding_dim=16", "model.item_features=[brand,price]"]
    values.append("model.num_heads=2")
    model, index, store = tmp_path / "model", tmp_path / "index", Store(job.store)
    dpsr("train", f"--store={job.store}", f"--out={model}", *(f"--set={value}" for value in values))
    dpsr("index", f"--model={model}", f"--store={job.store}", f"--out={index}")
    queries = ["phone case", "kids keybaord"]
    expected = ask(exact_search(model, store), queries, None, 20)[1]
    np.testing.assert_allclose(ask(retriever("index", str(index), store), queries, None, 20)[1], expected, atol=1e-5)
    dpsr("export", f"--model={model}", f"--index={index}", f"--out={tmp_path / 'servable'}")
    assert "servable/1: 400 items; ann_recall@100 1.0000, p50 " in capsys.readouterr().out
    found = ask(retriever("servable", str(tmp_path / "servable"), store), queries, None, 20)[1]
    np.testing.assert_allclose(found, expected, atol=1e-5)
