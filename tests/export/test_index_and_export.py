"""`dpsr index` and `dpsr export`: from a checkpoint to a servable that answers like its parts."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import faiss
import numpy as np
import pytest
import tensorflow as tf
from conftest import Job

from dpsr_common.command_line import main
from dpsr_common.packed_file import PackedFile
from dpsr_export.warmup import LoadedServable
from dpsr_tf.data.examples_dataset import Tokens
from dpsr_tf.data.store import Store
from dpsr_tf.models.model_directory import ModelDirectory
from dpsr_tf.models.two_tower import TwoTower

pytestmark = pytest.mark.slow
v1 = tf.compat.v1

QUERIES = ["phone case", "苹果 手机", "kids keybaord", "", "!!", "zzzzqqq", "\u3000", "a" * 5000]


class Loaded:
    """A servable in a TF1 session, as a model server runs it; what a signature takes beside `inputs` is absent."""

    def __init__(self, path: Path):
        self.servable = LoadedServable(path)

    def __call__(self, signature: str, **inputs: object) -> dict[str, np.ndarray]:
        types = self.servable.inputs[signature]
        assert set(inputs) <= set(types)
        absent = {name: np.zeros([0] * rank, dtype) if rank else b"" for name, (dtype, rank) in types.items()}
        return self.servable(signature, absent | inputs)


@pytest.fixture(scope="module")
def servable(job: Job) -> Loaded:
    return Loaded(job.servable / "1")


def query_embedding_of(job: Job, texts: list[str]) -> np.ndarray:
    """The query tower without the servable: pybind11 tokenizer, checkpoint, no FAISS."""
    model = ModelDirectory.open(job.model)
    with tf.Graph().as_default(), v1.Session() as session:
        tokens = Tokens(v1.placeholder(tf.int32, [None]), v1.placeholder(tf.int64, [None]))
        embedding = TwoTower(model.config.model, model.vocabulary.num_ids).query_embedding(tokens)[:, 0]
        v1.train.Saver().restore(session, tf.train.latest_checkpoint(str(job.model)))
        values, splits = model.vocabulary.encode_batch(texts)
        return session.run(embedding, {tokens.values: values, tokens.row_splits: splits})


def test_fused_answer_equals_its_parts(job: Job, servable: Loaded) -> None:
    embeddings = query_embedding_of(job, QUERIES)
    index = faiss.read_index(str(job.index / "items.faiss"))
    ids = PackedFile(str(job.index / "item_ids.dpsr"), "item_ids")["id"]
    scores, positions = index.search(embeddings, 20)
    found = servable("search", query=QUERIES, k=20)
    np.testing.assert_array_equal(servable("query_embedding", query=QUERIES)["query_embedding"][:, 0], embeddings)
    for row, text in enumerate(QUERIES):
        if not embeddings[row].any():
            assert text in ("", "!!", "\u3000"), text
            assert (found["item_ids"][row] == -1).all() and (found["scores"][row] == -np.inf).all()
            assert (found["heads"][row] == -1).all()
            continue
        # Equal scores: FAISS has an order of its own, ours is by item id.
        order = np.lexsort((ids[positions[row]], -scores[row]))
        np.testing.assert_array_equal(found["item_ids"][row], ids[positions[row]][order])
        np.testing.assert_array_equal(found["scores"][row], scores[row][order])
        assert (found["heads"][row] == 0).all()


def test_serving_default_is_search_at_the_manifests_k(job: Job, servable: Loaded) -> None:
    manifest = json.loads((job.servable / "1" / "assets.extra" / "dpsr_manifest.json").read_text())
    assert manifest["k"] == 7 and manifest["config"]["model"]["embedding_dim"] == 16
    assert manifest["measured"]["ann_recall@7"] == 1.0 and manifest["measured"]["p99_ms"] > 0
    assert manifest["inputs"]["search"] == sorted(servable.servable.inputs["search"])
    default, search = servable("serving_default", query=QUERIES), servable("search", query=QUERIES, k=7)
    assert default["item_ids"].shape == (len(QUERIES), 7)
    for name, value in default.items():
        np.testing.assert_array_equal(value, search[name])


def test_score_signature_is_the_inner_product(job: Job, servable: Loaded) -> None:
    store = Store(job.store)
    found = servable("search", query=["phone case"], k=5)
    title_of = dict(zip(store.items()["id"].tolist(), store.titles(), strict=True))
    titles = [title_of[item] for item in found["item_ids"][0]]
    scores = servable("score", query=["phone case"] * 5, item_text=titles)["score"]
    np.testing.assert_allclose(scores, found["scores"][0], rtol=1e-5, atol=1e-6)


def test_k_beyond_the_corpus_is_padded_and_bad_k_is_refused(job: Job, servable: Loaded) -> None:
    found = servable("search", query=["phone case"], k=500)["item_ids"][0]
    assert (found >= 0).sum() == 400 and len(set(found[:400].tolist())) == 400 and (found[400:] == -1).all()
    for k in (0, -1, 10_001):
        with pytest.raises(tf.errors.InvalidArgumentError, match=rf"{k}.*10000"):
            servable("search", query=["phone case"], k=k)


def test_bytes_that_are_not_utf8_are_answered(servable: Loaded) -> None:
    found = servable("search", query=[b"phone\xffcase", b"phone case", b"\xff\xfe\x00"], k=3)["item_ids"]
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[2] == -1).all()


def test_titles_file_has_every_item(job: Job) -> None:
    store = Store(job.store)
    with gzip.open(job.servable / "1" / "assets.extra" / "item_titles.tsv.gz", "rt") as file:
        rows = dict(line.rstrip("\n").split("\t") for line in file)
    assert rows == dict(zip((str(i) for i in store.items()["id"]), store.titles(), strict=True))


def test_index_is_exact_and_says_so(job: Job) -> None:
    manifest = json.loads((job.index / "index.json").read_text())
    assert manifest["ann_recall@100"] == 1.0 and manifest["items"] == 400 and manifest["empty_items"] == 0
    file = PackedFile(str(job.index / "item_embeddings.dpsr"), "item_embeddings")
    embeddings = file["embedding"].reshape(400, 16)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(file["id"], Store(job.store).items()["id"])


def test_approximate_index_reports_the_recall_it_has(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = tmp_path / "model"
    shutil.copytree(job.model, model)
    config = (model / "config.yaml").read_text()
    arguments = ["index", f"--model={model}", f"--store={job.store}", f"--out={tmp_path / 'index'}"]
    config = config.replace("factory: ''", "factory: IVF16,Flat")
    recall = []
    for nprobe in (1, 16):  # given, not chosen: the choice among settings goes by their times
        (model / "config.yaml").write_text(config.replace("parameters: ''", f"parameters: nprobe={nprobe}"))
        assert main([*arguments, "--overwrite"]) == 0
        recall.append(json.loads((tmp_path / "index" / "index.json").read_text())["ann_recall@100"])
    assert recall[0] < 0.9 and recall[1] == 1.0
    (model / "config.yaml").write_text(config.replace("factory: IVF16,Flat", "factory: Flatt"))
    capsys.readouterr()
    assert main([*arguments, "--overwrite"]) == 1
    error = capsys.readouterr().err
    assert "index.factory 'Flatt'" in error and "Traceback" not in error
    assert json.loads((tmp_path / "index" / "index.json").read_text())["factory"] == "IVF16,Flat"  # untouched


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: (d / "index.json").unlink(), "holds no index"),
        (lambda d: (d / "index.json").write_text("{"), "cannot be read"),
        (lambda d: edit(d, version=7), "version 7, expected dpsr-index version 3"),
        (lambda d: edit(d, vocabulary_fingerprint="0" * 16), "vocabulary_fingerprint is 0000000000000000"),
        (lambda d: edit(d, checkpoint="model.ckpt-99"), "model.ckpt-99, which"),
        (lambda d: (d / "items.faiss").write_bytes((d / "items.faiss").read_bytes()[:-100]), "items.faiss"),
        (lambda d: (d / "item_ids.dpsr").write_bytes(b"DPSRPACK"), "item_ids.dpsr"),
    ],
)
def test_export_refuses_a_bad_index_and_leaves_nothing(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture, change: object, message: str
) -> None:
    index = tmp_path / "index"
    shutil.copytree(job.index, index)
    change(index)  # type: ignore[operator]
    assert main(["export", f"--model={job.model}", f"--index={index}", f"--out={tmp_path / 'servable'}"]) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1, error
    assert not (tmp_path / "servable").exists()


def edit(index: Path, **changes: object) -> None:
    manifest = json.loads((index / "index.json").read_text())
    (index / "index.json").write_text(json.dumps({**manifest, **changes}))


def test_versions_count_up_and_are_never_replaced(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["export", f"--model={job.model}", f"--index={job.index}", f"--out={tmp_path}"]
    shutil.copytree(job.servable / "1", tmp_path / "41")
    assert main(arguments) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["41", "42"]
    capsys.readouterr()
    assert main([*arguments, "--version_number=41"]) == 1
    assert "41: exists already" in capsys.readouterr().err


def test_index_refuses_a_store_of_another_vocabulary(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for command in (
        ["generate", f"--out={tmp_path / 'shop'}", "--seed=2", "--items=400", "--users=20", "--interactions=2000"],
        ["ingest", f"--schema={tmp_path / 'shop' / 'schema.yaml'}", f"--out={tmp_path / 'store'}"],
    ):
        assert main(command) == 0
    capsys.readouterr()
    assert main(["index", f"--model={job.model}", f"--store={tmp_path / 'store'}", f"--out={tmp_path / 'i'}"]) == 1
    assert "another vocabulary than that of" in capsys.readouterr().err
    assert not (tmp_path / "i").exists()
