"""`dpsr index` and `dpsr export` of models with a quantizer."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
import yaml
from conftest import Job, dpsr

from dpsr_common.command_line import main
from dpsr_export.embeddings import ItemEmbeddings
from dpsr_export.export import Index
from dpsr_export.item_rows import ItemWriter
from dpsr_export.warmup import LoadedServable
from dpsr_tf.data.store import Store
from dpsr_tf.evaluation.corpus import Corpus
from dpsr_tf.evaluation.retriever import ask
from dpsr_tf.evaluation.systems import Systems
from dpsr_tf.models.quantizer import COARSE, CODEBOOKS, ENCODER_COARSE, ENCODER_CODEBOOKS, ROTATION, Quantizer

pytestmark = pytest.mark.slow

LISTS, SUB_SPACES, DIM = 16, 8, 16


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    """Searches with more threads than free cores take many times as long."""
    faiss.omp_set_num_threads(1)


def add_quantizer(model: Path, vectors: np.ndarray, bits: int, seed: int = 1, codes: str = "product") -> Quantizer:
    """Gives the last checkpoint of a model a quantizer, as training would, and the config its section."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0].astype(np.float32)
    rotation = np.eye(DIM, dtype=np.float32) if codes == "residual" else rotation
    z = vectors @ rotation
    coarse = z[rng.choice(len(z), LISTS, replace=False)]
    residual = np.split(z - coarse[faiss.knn(z, coarse, 1)[1][:, 0]], SUB_SPACES, axis=1)
    codebooks = np.stack([part[rng.choice(len(z), 1 << bits, replace=False)] for part in residual])
    values = {ROTATION: rotation, COARSE: coarse, CODEBOOKS: codebooks}
    if codes == "residual":
        books = rng.normal(size=(SUB_SPACES, 1 << bits, DIM)).astype(np.float32) * 0.1
        values |= {ENCODER_COARSE: coarse, ENCODER_CODEBOOKS: books}
        values |= {CODEBOOKS: books + rng.normal(size=books.shape).astype(np.float32) * 0.01}
    checkpoint = tf.train.latest_checkpoint(str(model))
    reader = tf.train.load_checkpoint(checkpoint)
    tensors = {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}
    tensors |= values
    for path in model.glob(f"{Path(checkpoint).name}.*"):
        path.unlink()
    names = sorted(tensors)
    tf.raw_ops.SaveV2(
        prefix=checkpoint, tensor_names=names, shape_and_slices=[""] * len(names), tensors=[tensors[n] for n in names]
    )
    config = yaml.safe_load((model / "config.yaml").read_text())
    config["quantizer"] |= {"sub_spaces": SUB_SPACES, "bits": bits, "lists": LISTS, "codes": codes}
    config["quantizer"] |= {"rotation": "none"} if codes == "residual" else {}
    (model / "config.yaml").write_text(yaml.safe_dump(config))
    return Quantizer.read(checkpoint)


@dataclasses.dataclass(frozen=True)
class Learned:
    """A model with a quantizer, the embeddings of its items, and its index."""

    job: Job
    quantizer: Quantizer
    vectors: np.ndarray


def make_learned(job: Job, root: Path, bits: int, codes: str = "product") -> Learned:
    made = dataclasses.replace(job, model=root / "model", index=root / "index", servable=root / "servable")
    shutil.copytree(job.model, made.model)
    vectors = np.array(ItemEmbeddings(job.index / "item_embeddings.dpsr", DIM).vectors)
    quantizer = add_quantizer(made.model, vectors, bits, codes=codes)
    dpsr(*index_arguments(made, made.index))
    dpsr("export", f"--model={made.model}", f"--index={made.index}", f"--out={made.servable}")
    return Learned(made, quantizer, vectors)


def index_arguments(job: Job, out: Path, *more: str) -> list[str]:
    return ["index", f"--model={job.model}", f"--store={job.store}", f"--out={out}", *more]


@pytest.fixture(scope="module")
def learned(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Learned:
    return make_learned(job, tmp_path_factory.mktemp("learned"), 8)


@pytest.fixture(scope="module")
def learned_4_bits(personal: Job, tmp_path_factory: pytest.TempPathFactory) -> Learned:
    """Of a personal model with two heads and averaged weights."""
    return make_learned(personal, tmp_path_factory.mktemp("learned_4_bits"), 4)


@pytest.fixture(scope="module")
def learned_residual(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Learned:
    return make_learned(job, tmp_path_factory.mktemp("learned_residual"), 8, "residual")


def manifest_of(index: Path) -> dict:
    return json.loads((index / "index.json").read_text())


def failed(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1, error
    return error


def stock(index: Path, nprobe: int = LISTS) -> faiss.Index:
    held = faiss.read_index(str(index / "items.faiss"))
    faiss.ParameterSpace().set_index_parameters(held, f"nprobe={nprobe}")
    return held


def test_the_index_is_that_of_the_checkpoint(
    learned: Learned, learned_4_bits: Learned, learned_residual: Learned
) -> None:
    for made, bits, kind in ((learned, 8, "PQ"), (learned_4_bits, 4, "PQ"), (learned_residual, 8, "RQ")):
        manifest, quantizer = manifest_of(made.job.index), made.quantizer
        codes = "residual" if kind == "RQ" else "product"
        assert manifest["factory"] == f"quantizer (IVF16,{kind}8x{bits})"
        assert manifest["config"]["factory"] == "quantizer"
        assert manifest["quantizer"] == {
            "fingerprint": quantizer.fingerprint, "lists": LISTS, "sub_spaces": SUB_SPACES, "bits": bits, "codes": codes
        }  # fmt: skip
        assert manifest["entries"] == 1 and manifest["seconds"].keys() == {"embeddings", "index"}
        queries = np.random.default_rng(3).normal(size=(20, DIM)).astype(np.float32)
        scores, positions = stock(made.job.index).search(queries, len(made.vectors))
        expected = queries @ quantizer(made.vectors).T
        np.testing.assert_allclose(scores, np.take_along_axis(expected, positions, axis=1), rtol=0, atol=1e-4)
        report = json.loads((made.job.index / "recall.json").read_text())
        nprobes = [setting["parameters"] for setting in report["settings"]]
        assert "nprobe=1" in nprobes and manifest["parameters"] in nprobes


def test_servable_finds_what_stock_faiss_finds(
    learned: Learned, learned_4_bits: Learned, learned_residual: Learned
) -> None:
    for made in (learned, learned_4_bits, learned_residual):
        version = made.job.servable / "1"
        servable, manifest = (
            LoadedServable(version),
            json.loads((version / "assets.extra" / "dpsr_manifest.json").read_text()),
        )
        assert manifest["quantizer"] == made.quantizer.fingerprint == manifest["index"]["quantizer"]["fingerprint"]
        request = servable.search_inputs([{"query": "phone case"}, {"query": "red shoes"}], 20, "nprobe=16")
        found = servable("search", request)
        heads = servable("query_embedding", {"query": request["query"]})["query_embedding"]
        products = (heads @ made.quantizer(made.vectors).T).max(axis=1)
        np.testing.assert_allclose(found["scores"], -np.sort(-products, axis=1)[:, :20], atol=1e-4)
        servable.close()


@pytest.mark.long
def test_other_indexes_of_the_same_model(
    learned: Learned, learned_4_bits: Learned, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for made, factory, kind in (
        (learned, "Flat", faiss.IndexFlat),
        (learned, "OPQ8,IVF8,PQ8np", faiss.IndexPreTransform),
        (learned_4_bits, "quantizer_fs", faiss.IndexPreTransform),
    ):
        out = tmp_path / factory.partition(",")[0]
        dpsr(*index_arguments(made.job, out, f"--set=index.factory={factory}"))
        assert isinstance(faiss.downcast_index(stock(out, 1) if "IVF" in factory else stock_of(out)), kind)
        of_quantizer = factory == "quantizer_fs"
        assert (manifest_of(out)["quantizer"] is not None) == of_quantizer
        assert (out / "semantic_ids.parquet").exists() == of_quantizer
        # All of them are of the same model, so a servable takes one after the other.
        base = tmp_path / f"base-{out.name}"
        shutil.copytree(made.job.servable / "1", base / "1")
        dpsr("export", "--index_only", f"--index={out}", f"--out={base}")
        dpsr("export", "--index_only", f"--index={made.job.index}", f"--out={base}")
        LoadedServable(base / "3").close()
    assert "IVF16,PQ8x4fs" in manifest_of(tmp_path / "quantizer_fs")["factory"]
    error = failed(capsys, *index_arguments(learned.job, tmp_path / "no", "--set=index.factory=quantizer_fs"))
    assert "'quantizer_fs' needs codes of 4 bits, but quantizer.bits is 8" in error


def stock_of(index: Path) -> faiss.Index:
    return faiss.read_index(str(index / "items.faiss"))


def test_what_has_no_quantizer(job: Job, learned: Learned, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    error = failed(capsys, *index_arguments(job, tmp_path / "no", "--set=index.factory=quantizer"))
    assert "takes the model's quantizer, but quantizer.sub_spaces is 0" in error and "index.factory=auto" in error
    # A checkpoint of a step before the quantizer's start.
    early = tmp_path / "early"
    shutil.copytree(job.model, early)
    shutil.copyfile(learned.job.model / "config.yaml", early / "config.yaml")
    error = failed(capsys, *index_arguments(dataclasses.replace(job, model=early), tmp_path / "no"))
    assert "has no trained quantizer, because it is of a step before quantizer.start_step" in error
    assert not (tmp_path / "no").exists()
    # Its float embeddings can be indexed all the same.
    arguments = index_arguments(dataclasses.replace(job, model=early), tmp_path / "flat", "--set=index.factory=Flat")
    dpsr(*arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("index.parameters=nprobe=4,max_codes=x", "FAISS refuses index.parameters"),
        ("index.factory=auto index.second_list=1.5", "index.factory auto chooses among indexes without second lists"),
        ("index.factory=Flat index.second_list=1.5", "only an index of product codes in lists can have second lists"),
        ("index.second_list=-1", "second_list is -1"),
        ("index.factory=IVF8,PQ8x4fs index.parameters=max_codes=9", "FastScan does not obey max_codes"),
    ],
)
def test_what_is_refused(
    learned: Learned, tmp_path: Path, capsys: pytest.CaptureFixture, settings: str, message: str
) -> None:
    flags = [f"--set={setting}" for setting in settings.split()]
    assert message in failed(capsys, *index_arguments(learned.job, tmp_path / "no", *flags))
    assert not (tmp_path / "no").exists()


def test_a_servable_refuses_another_quantizer(learned: Learned, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The same towers and items; only the quantizer was trained another time."""
    model = tmp_path / "model"
    shutil.copytree(learned.job.model, model)
    other = add_quantizer(model, learned.vectors, 8, seed=2)
    job = dataclasses.replace(learned.job, model=model, index=tmp_path / "index")
    dpsr(*index_arguments(job, job.index))
    base = tmp_path / "base"
    shutil.copytree(learned.job.servable / "1", base / "1")
    ours, theirs = learned.quantizer.fingerprint, other.fingerprint
    error = failed(capsys, "export", "--index_only", f"--index={job.index}", f"--out={base}")
    assert f"was made of the quantizer {theirs}, but the servable {base / '1'} has the quantizer {ours}" in error
    error = failed(capsys, "export", f"--model={learned.job.model}", f"--index={job.index}", f"--out={base}")
    assert f"was made of the quantizer {theirs}, but model {learned.job.model / 'model.ckpt-30'} has" in error
    assert [path.name for path in base.iterdir()] == ["1"]
    # A servable that knows of no quantizer, as one of an earlier version.
    path = base / "1" / "assets.extra" / "dpsr_manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["quantizer"]
    path.write_text(json.dumps(manifest))
    error = failed(capsys, "export", "--index_only", f"--index={job.index}", f"--out={base}")
    assert "has none; run `dpsr index` with that model" in error


def test_new_items_get_codes_of_the_frozen_layer(learned: Learned, tmp_path: Path) -> None:
    """A day later: more items, the same model, and only the index of the servable is renewed."""
    dpsr("generate", f"--out={tmp_path / 'shop'}", "--items=500", "--users=20", "--interactions=2000", "--seed=5")
    schema = tmp_path / "shop" / "schema.yaml"
    store = tmp_path / "store"
    dpsr("ingest", f"--schema={schema}", "--items_only", f"--like={learned.job.model}", f"--out={store}")
    job = dataclasses.replace(learned.job, store=store, index=tmp_path / "index")
    dpsr(*index_arguments(job, job.index))
    base = tmp_path / "base"
    shutil.copytree(learned.job.servable / "1", base / "1")
    dpsr("export", "--index_only", f"--index={job.index}", f"--out={base}")
    vectors = ItemEmbeddings(job.index / "item_embeddings.dpsr", DIM).vectors
    assert len(vectors) == 500
    lists, codes = learned.quantizer.encode(vectors)
    rows = pq.read_table(job.index / "semantic_ids.parquet").to_pylist()
    expected = [
        " ".join([f"list:{number}", *(f"{m}:{code}" for m, code in enumerate(row))])
        for number, row in zip(lists.tolist(), codes.tolist(), strict=True)
    ]
    same = np.mean([row["semantic_id"] == want for row, want in zip(rows, expected, strict=True)])
    assert same > 0.99, "but for rounding"
    servable = LoadedServable(base / "2")
    found = servable("search", servable.search_inputs([{"query": "phone case"}], 50, "nprobe=16"))
    query = servable("query_embedding", {"query": np.array(["phone case"], object)})["query_embedding"][:, 0]
    products = -np.sort(-(query @ learned.quantizer(vectors).T), axis=1)
    np.testing.assert_allclose(found["scores"], products[:, :50], atol=1e-4)
    servable.close()


def test_new_items_among_residual_codes(learned_residual: Learned, tmp_path: Path) -> None:
    """Items of the log of changes keep their vectors until the next index, which encodes them as the layer does."""
    made, base = learned_residual, tmp_path / "base"
    shutil.copytree(made.job.servable / "1", base / "1")
    servable = LoadedServable(base / "1")
    query = servable("query_embedding", {"query": np.array(["phone case"], object)})["query_embedding"][:, 0]
    request = servable.search_inputs([{"query": "phone case"}], 500, "nprobe=16")
    gone = int(servable("search", request)["item_ids"][0, 0])
    servable.close()
    new = {"brand": "Acme", "category": "cases", "shop": "one", "in_stock": "yes"}
    with ItemWriter(base) as writer:
        writer.add(
            [new | {"item_id": 1 + i, "title": f"phone case {i}", "price": 10.0 + i} for i in range(40)]
        ).result()
        writer.delete([gone]).result()
    servable = LoadedServable(base / "1")
    servable("apply_changes", {})
    found = servable("search", request)
    ids = found["item_ids"][0].tolist()
    assert gone not in ids and set(range(1, 41)) <= set(ids)
    cheap = servable("search", request | {"include": np.array([[b"price=..15"]], object)})["item_ids"][0]
    assert set(range(1, 7)) <= set(cheap.tolist())
    servable.close()
    dpsr("index", "--merge", f"--index={made.job.index}", f"--servable={base}", f"--out={tmp_path / 'merged'}")
    merged = Index.open(tmp_path / "merged")
    vectors, merged_ids = np.array(merged.vectors()), merged.item_ids().tolist()
    scores, positions = stock(merged.path).search(query, len(vectors))
    expected = query @ made.quantizer(vectors).T
    np.testing.assert_allclose(scores, np.take_along_axis(expected, positions, axis=1), rtol=0, atol=1e-4)
    # Before, a new item had the score of its own vector.
    for item in (1, 20, 40):
        vector = vectors[merged_ids.index(item)]
        assert found["scores"][0, ids.index(item)] == pytest.approx(float(vector @ query[0]), abs=1e-5)


def test_shards_of_residual_codes(learned_residual: Learned, tmp_path: Path) -> None:
    whole, queries = stock(learned_residual.job.index), learned_residual.vectors[::37]
    scores, positions = whole.search(queries, whole.ntotal)
    by_position = np.take_along_axis(scores, positions.argsort(axis=1), axis=1)
    for number in range(3):
        with Index.open(learned_residual.job.index).part(number, 3, tmp_path) as part:
            scores, positions = stock(part.path).search(queries, whole.ntotal // 3 + 1)
            count = part.manifest["items"]
            found = np.take_along_axis(scores[:, :count], positions[:, :count].argsort(axis=1), axis=1)
            np.testing.assert_allclose(found, by_position[:, number::3], atol=1e-5)


@pytest.mark.parametrize(
    "factory", ["quantizer", *(pytest.param(name, marks=pytest.mark.long) for name in ("quantizer_fs", "IVF8,PQ8x4np"))]
)
def test_two_lists_and_shards(learned_4_bits: Learned, tmp_path: Path, factory: str) -> None:
    """Shards have the whole index's codes, in both lists; a servable finds each item once."""
    job, out = learned_4_bits.job, tmp_path / "index"
    settings = [f"--set=index.factory={factory}", "--set=index.second_list=1.5", "--set=index.parameters=nprobe=3"]
    dpsr(*index_arguments(job, out, *settings))
    assert manifest_of(out)["entries"] == 2
    items = manifest_of(out)["items"]
    whole = stock(out)
    assert whole.ntotal == 2 * items
    queries = learned_4_bits.vectors[::37]

    def scores_of(index: faiss.Index) -> np.ndarray:
        """Both scores of each position, sorted: [queries, positions, 2]."""
        scores, positions = index.search(queries, index.ntotal)
        order = np.lexsort((scores, positions))
        return np.take_along_axis(scores, order, axis=1).reshape(len(queries), -1, 2)

    for number in range(3):
        with Index.open(out).part(number, 3, tmp_path) as part:
            assert faiss.extract_index_ivf(faiss.read_index(str(part.path / "items.faiss"))).nprobe == 3
            # FastScan rounds its tables by query, so it has the same scores, too.
            np.testing.assert_allclose(scores_of(stock(part.path)), scores_of(whole)[:, number::3], atol=1e-5)
    dpsr("export", f"--model={job.model}", f"--index={out}", f"--out={tmp_path / 'base'}", "--shards=3")
    dpsr("export", f"--model={job.model}", f"--index={out}", f"--out={tmp_path / 'whole'}")
    inputs = None
    found = []
    for base in (tmp_path / "whole", *(tmp_path / "base" / f"shard-{i}-of-3" for i in range(3))):
        servable = LoadedServable(base / "1")
        inputs = inputs or servable.search_inputs([{"query": "phone case"}], 120, manifest_of_max(base / "1"))
        found.append(servable("search", inputs))
        servable.close()
    ids = found[0]["item_ids"][0]
    assert len(set(ids.tolist())) == 120 and (ids >= 0).all()
    merged = np.concatenate([shard["scores"][0] for shard in found[1:]])
    np.testing.assert_allclose(-np.sort(-merged)[:120], found[0]["scores"][0], atol=1e-5)
    # `dpsr evaluate` counts items once, too.
    store = Store(job.store)
    ask_index = Systems(Corpus.of_store(store)).make(f"index:{out}")
    answered = ask(ask_index, ["phone case"], None, 30)[0]
    assert len(set(answered[0].tolist())) == 30


def manifest_of_max(version: Path) -> str:
    manifest = json.loads((version / "assets.extra" / "dpsr_manifest.json").read_text())
    return manifest["search_parameters"]["max"]


def test_a_servable_has_the_scan_budget_of_its_index(learned: Learned, tmp_path: Path) -> None:
    out, base = tmp_path / "index", tmp_path / "base"
    dpsr(*index_arguments(learned.job, out, "--set=index.parameters=nprobe=16,max_codes=30"))
    report = json.loads((out / "recall.json").read_text())
    assert all("max_codes=30" in setting["parameters"] for setting in report["settings"])
    shutil.copytree(learned.job.servable / "1", base / "1")
    dpsr("export", "--index_only", f"--index={out}", f"--out={base}")
    dpsr("export", f"--model={learned.job.model}", f"--index={out}", f"--out={base}")
    for version in ("2", "3"):
        servable = LoadedServable(base / version)

        def count(parameters: str, servable: LoadedServable = servable) -> int:
            inputs = servable.search_inputs([{"query": "phone case"}], 100, parameters)
            return int((servable("search", inputs)["item_ids"] >= 0).sum())

        assert count("") == count("nprobe=16") == 30 and count("max_codes=12") == 12
        with pytest.raises(tf.errors.InvalidArgumentError, match="max_codes is 31, expected at most 30"):
            count("max_codes=31")
        servable.close()
    # Without a budget, a request may set one.
    servable = LoadedServable(base / "1")
    inputs = servable.search_inputs([{"query": "phone case"}], 100, "nprobe=16,max_codes=25")
    assert (servable("search", inputs)["item_ids"] >= 0).sum() == 25
    servable.close()


def test_recall_of_relevant_items_in_the_report(
    learned: Learned, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    store = Store(learned.job.store)
    ids, titles = store.items()["id"].tolist(), store.titles()
    judged = "".join(f"{titles[row]}\t{ids[row]}\t{grade}\n" for row in range(0, 90) for grade in (3,))
    (tmp_path / "judged.tsv").write_text("q\tid\tg\n" + judged + f"{titles[95]}\t{ids[96]}\t1\n")
    columns = ["--query_column=q", "--item_column=id", "--grade_column=g", "--relevant_from=2"]
    given = [f"--judgments={tmp_path / 'judged.tsv'}", *columns]
    capsys.readouterr()
    dpsr(*index_arguments(learned.job, tmp_path / "index", *given))
    assert "recall of relevant items by exact search: rel@7 " in capsys.readouterr().out
    report, manifest = json.loads((tmp_path / "index" / "recall.json").read_text()), manifest_of(tmp_path / "index")
    assert report["exact_relevant_recall@1000"] == 1, "400 items"
    last = report["settings"][-1]
    assert last["relevant_recall@1000"] == 1 or last["parameters"] != "nprobe=16"
    recalls = [setting["relevant_recall@10"] for setting in report["settings"]]
    assert 0 < recalls[0] <= max(recalls) <= 1 and manifest["relevant_recall@10"] in recalls
    # The same figure as of the exact system of `dpsr evaluate`.
    exact = Systems(Corpus.of_store(store)).make(f"model:{learned.job.model}")
    found = ask(exact, titles[:90], None, 10)[0]
    shares = [np.isin(list({ids[j] for j in range(90) if titles[j] == titles[row]}), found[row]) for row in range(90)]
    first = [row for row in range(90) if titles.index(titles[row]) == row]
    expected = np.mean([shares[row].mean() for row in first])
    assert report["exact_relevant_recall@10"] == pytest.approx(expected)
    error = failed(capsys, *index_arguments(learned.job, tmp_path / "no", f"--judgments={tmp_path / 'none.tsv'}"))
    assert "none.tsv: no such file" in error


def test_semantic_ids_are_an_item_feature(learned: Learned, tmp_path: Path) -> None:
    """The recipe of docs/index.md: join the table with the items, and name the column in the schema."""
    shop = tmp_path / "shop"
    dpsr("generate", f"--out={shop}", "--items=400", "--users=20", "--interactions=2000")
    schema = yaml.safe_load((shop / "schema.yaml").read_text())
    (files,) = shop.glob(schema["items"]["files"])
    items, codes = pq.read_table(files), pq.read_table(learned.job.index / "semantic_ids.parquet")
    joined = items.join(codes.rename_columns([schema["items"]["id"], "semantic_id"]), schema["items"]["id"])
    pq.write_table(joined.sort_by(schema["items"]["id"]), files)
    schema["items"]["features"].append({"column": "semantic_id", "kind": "multi", "separator": " "})
    (shop / "schema.yaml").write_text(yaml.safe_dump(schema))
    dpsr("ingest", f"--schema={shop / 'schema.yaml'}", f"--out={tmp_path / 'store'}")
    table = Store(tmp_path / "store").items()
    lengths = np.diff(table["feature.semantic_id.splits"])
    assert (lengths == 1 + SUB_SPACES).mean() > 0.9, "each item with an embedding has its list and its codes"
    assert isinstance(joined, pa.Table)
