"""A fused servable, from query text to the top 1,000 items: in one process, over gRPC, and compared with two services.

    python benchmarks/servable.py --json [--items=1000000] [--folder=DIR] [--quick]

The items come from benchmarks/vectors.py, in the index that `auto` chooses, with the fastest search parameters whose
ann_recall@1000 is 0.90. The model has the default config and is exported as by `dpsr export`, with one head and with
two. It is not trained. Its embedding table is filled so that each of 500 query texts gets a query vector of
benchmarks/vectors.py (or two vectors, with two heads), which costs as much as a trained model.

- in process: CPU time of a query, on one thread and without a server. `fused` begins with the text. `op` and `bare`
  begin with the vector: the op (50 queries in a call) and FAISS alone (Python, one query at a time), with the same
  mapped file.
- load: wall and CPU time of a model server from its start until it answers, with the files of the version in the
  system's cache (`load`) and without (`load_cold`). It is measured for the query tower alone, for `fused`, and for
  `filters`, an index with the six attributes of benchmarks/filter_cost.py.
- grpc: one model server under closed loops of the load generator, with CPU time and memory.
- called in turn: p50 of a Python client on the same machine, one call at a time. `fused` asks one server.
  `two_services` asks a server of the query tower for the vector, and then a server of the index, as it must be done
  when tower and index are not in one graph. All three servers are DPSR's model server.

Bars: `op_over_bare_faiss`, `two_service_over_fused_p50`, `head2_over_head1` (for `fused`), and
`filter_cost_ratio_worst` (benchmarks/filter_cost.py describes it). With --folder the vectors are kept in that
directory, as by benchmarks/index.py.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read when TensorFlow loads

import faiss
import filter_cost
import grpc
import numpy as np
import report
import servers
import tensorflow as tf
from absl import app, flags, logging
from tensorflow_serving.apis import predict_pb2
from vectors import DIM, Vectors

import dpsr_export
import dpsr_tokenizer
import model_server
from dpsr_export import ann, faiss_search, signatures
from dpsr_tf.config import Config, ModelConfig, ServingConfig
from dpsr_tf.data.examples_dataset import Tokens
from dpsr_tf.models.features import FeatureSpec
from dpsr_tf.models.model_directory import ModelDirectory
from dpsr_tf.models.two_tower import TwoTower
from dpsr_tokenizer import tf_ops

K = 1000
TARGET = 0.90
QUERIES = 500
_BATCH = 50
_IO_FLAG_MMAP = 0x200  # maps the index, as the op does (faiss::IO_FLAG_MMAP_IFC)
_PREDICT = "/tensorflow.serving.PredictionService/Predict"

v1 = tf.compat.v1
FLAGS = flags.FLAGS


def texts() -> list[str]:
    """Returns the query texts. Each of them has one word that no other has."""
    return [f"{text} q{1000 + i}x" for i, text in enumerate(servers.queries(QUERIES))]


def make_index(result: report.Report, folder: Path, items: np.ndarray, queries: np.ndarray) -> str:
    """Writes items.faiss, with its search parameters set, and item_ids.dpsr. Returns the name of the workload."""
    candidates = [c.factory for c in ann.candidates(len(items), DIM, TARGET) if not c.verdict]
    index = ann.build(items, candidates[0])
    exact = ann.Exact(items, queries, [K])
    chosen = ann.choose(ann.measure_settings(index, exact, queries, K), K, TARGET)
    ann.set_parameters(index, chosen.parameters)
    faiss.write_index(index, str(folder / "items.faiss"))
    faiss_search.write_item_ids(folder / "item_ids.dpsr", item_ids(len(items)), folder / "items.faiss")
    workload = f"{len(items):,} x {DIM}, {candidates[0]}, {chosen.parameters or '-'}"
    result.add("bare", workload, f"ann_recall@{K}", chosen.ann_recall[K], "")
    return workload


def make_model(folder: Path, vectors: np.ndarray) -> ModelDirectory:
    """Writes a model, with the checkpoint model.ckpt, whose query i has the embedding vectors[i], [heads, DIM]."""
    heads = vectors.shape[1]
    folder.mkdir()
    builder = dpsr_tokenizer.VocabularyBuilder()
    builder.add(texts())
    builder.write(folder / "vocabulary.dpsr")
    vocabulary = dpsr_tokenizer.Vocabulary(folder / "vocabulary.dpsr")
    shape = ModelConfig(token_dim=heads * DIM, num_heads=heads, embedding_dim=DIM)
    model = ModelDirectory(
        folder,
        Config(model=shape, serving=ServingConfig(k=K)),
        FeatureSpec(num_tokens=vocabulary.num_ids),
        {},
        vocabulary,
    )
    # Only the rows of the words that a single query has are not zero.
    tokens, splits = vocabulary.encode_batch(texts())
    counts = np.bincount(tokens, minlength=vocabulary.num_ids)
    table = np.zeros((vocabulary.num_ids, heads * DIM), np.float32)
    for row, (begin, end) in enumerate(itertools.pairwise(splits)):
        own = next(token for token in tokens[begin:end] if counts[token] == 1)
        table[own] = vectors[row].reshape(-1)
    with tf.Graph().as_default(), v1.Session() as session:
        towers = TwoTower(shape, model.features)
        none = Tokens(tf.zeros([0], tf.int32), tf.zeros([1], tf.int64))
        towers.query_embedding(none), towers.item_embedding(none)
        session.run(v1.global_variables_initializer())
        for variable in v1.global_variables():
            value = {"kernel": np.eye(*variable.shape, dtype=np.float32)}.get(variable.op.name.rpartition("/")[2])
            if variable.shape == table.shape:
                value = table
            elif heads > 1 and variable.op.name.endswith("embedding/kernel") and "head_" in variable.op.name:
                head = int(variable.op.name.partition("head_")[2].partition("/")[0])
                value = np.eye(heads * DIM, DIM, -head * DIM, dtype=np.float32)
            if value is not None:
                variable.load(value, session)
        v1.train.Saver().save(session, str(folder / "model.ckpt"), write_meta_graph=False)
    return model


def make_servables(folder: Path, index: Path, queries: np.ndarray) -> dict[str, Path]:
    """Writes version directories: fused models with one and two heads, the query tower of the first, and the index."""
    made = {}
    said: dict[str, Any] = {"files": {"items.faiss": {}, "item_ids.dpsr": {}}, "serving_files": [], "string_ids": False}
    said["features"] = {"user": [], "item": []}
    for heads, name in ((1, "fused"), (2, "fused_2_heads")):
        vectors = np.stack([queries[:QUERIES], queries[QUERIES:]][:heads], axis=1)
        model = make_model(folder / f"model_{heads}", vectors)
        made[name] = folder / name / "1"
        made[name].parent.mkdir()
        checkpoint = str(model.path / "model.ckpt")
        signatures.write_saved_model(model, said, index, "", checkpoint, made[name])
        if heads == 1:
            made["query_tower"] = folder / "query_tower" / "1"
            with tf.Graph().as_default():
                query = v1.placeholder(tf.string, [None], "query")
                ragged = tf_ops.VocabularyTable(str(model.vocabulary_path)).tokenize(query)
                found = TwoTower(model.config.model, model.features).query_embedding(
                    Tokens(ragged.values, ragged.row_splits)
                )
                filter_cost.save_graph(made["query_tower"], {"query": query}, {"query_embedding": found}, checkpoint)
    made["index"] = folder / "index_service" / "1"
    with tf.Graph().as_default():
        vector = v1.placeholder(tf.float32, [None, 1, DIM], "query_embedding")
        table = faiss_search.FaissIndexTable(str(index / "items.faiss"), str(index / "item_ids.dpsr"))
        names = ("item_ids", "scores", "heads")
        outputs = dict(zip(names, table.search(vector, K), strict=True))
        filter_cost.save_graph(made["index"], {"query_embedding": vector}, outputs)
    return made


def in_process(
    result: report.Report, workload: str, index: Path, made: dict[str, Path], queries: np.ndarray, repeat: int, s: float
) -> None:
    """Measures CPU time of a query: the op and FAISS alone on the same vectors, and the fused graphs."""
    table = faiss_search.FaissIndexTable(str(index / "items.faiss"), str(index / "item_ids.dpsr"))
    bare = faiss.read_index(str(index / "items.faiss"), _IO_FLAG_MMAP)
    places = np.concatenate([bare.search(query[np.newaxis], K)[1] for query in queries[:QUERIES]])
    ours = table.search(queries[:QUERIES, np.newaxis], K)[0].numpy()
    theirs = np.where(places < 0, -1, item_ids(bare.ntotal)[places])
    assert all(set(a) == set(b) for a, b in zip(ours, theirs, strict=True)), "the op and FAISS find the same items"
    requests = index.parent / "vectors"
    servers.write_messages(requests, [_of_vectors(queries[i : i + _BATCH]) for i in range(0, QUERIES, _BATCH)])
    costs: dict[str, list[float]] = {"op": [], "bare": []}
    os.environ["TF_NUM_INTRAOP_THREADS"] = "1"
    for _ in range(repeat):
        costs["op"].append(model_server.session_run_us(_model(made["index"], requests), s) / _BATCH / 1000)
        costs["bare"].append(bare_ms(bare, queries[:QUERIES], s))
    del os.environ["TF_NUM_INTRAOP_THREADS"]
    for impl, samples in costs.items():
        result.add_samples(impl, workload, "core_ms", samples, "ms")
    ratios = [op / alone for op, alone in zip(*costs.values(), strict=True)]
    result.add_samples("op_over_bare", workload, "core_ms", ratios, "ratio")
    costs = {"fused": [], "fused_2_heads": []}
    for _ in range(repeat):
        for name, samples in costs.items():
            samples.append(model_server.session_run_us(_model(made[name], index.parent / "requests"), s) / 1000)
    for name, samples in costs.items():
        result.add_samples(name, workload, "core_ms", samples, "ms")
    ratios = [two / one for one, two in zip(*costs.values(), strict=True)]
    result.add_samples("heads_2_over_1", workload, "core_ms", ratios, "ratio")


def item_ids(items: int) -> np.ndarray:
    """Returns item ids like those of a shop: ascending, with gaps."""
    return np.cumsum(np.random.default_rng(1).integers(1, 1000, items))


def bare_ms(index: faiss.Index, queries: np.ndarray, seconds: float) -> float:
    """Returns the CPU time in ms of a search by FAISS from Python, one query at a time on one thread."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    rounds, begin, start = 0, time.perf_counter(), time.process_time()
    while rounds == 0 or time.perf_counter() - begin < seconds:
        for query in queries:
            index.search(query[np.newaxis], K)
        rounds += 1
    faiss.omp_set_num_threads(threads)
    return 1000 * (time.process_time() - start) / rounds / len(queries)


def _of_vectors(queries: np.ndarray) -> predict_pb2.PredictRequest:
    """Returns a request for the servable that has only the index."""
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = servers.MODEL, "serving_default"
    request.inputs["query_embedding"].CopyFrom(tf.make_tensor_proto(queries[:, np.newaxis]))
    return request


def over_grpc(
    result: report.Report, workload: str, made: dict[str, Path], requests: Path, repeat: int, seconds: float
) -> None:
    """Measures the fused servable under load, and one call at a time compared with two services."""
    times = [f"--seconds={seconds}", f"--warmup_seconds={seconds / 4}"]
    with contextlib.ExitStack() as stack:
        running = {
            name: stack.enter_context(model_server.serving("dpsr", _model(made[name], requests)))
            for name in ("fused", "query_tower", "index")
        }
        for concurrency in (1, 8):
            (found,) = servers.load(running["fused"], requests, f"--concurrency={concurrency}", *times)
            model_server.add_loads(result, "fused", workload, [found], concurrency=concurrency)
        p50: dict[str, list[float]] = {"fused": [], "two_services": []}
        with caller(running["fused"]) as fused, caller(running["query_tower"]) as tower, caller(running["index"]) as ix:
            asked = [servers.request([text], "serving_default").SerializeToString() for text in texts()]

            def two(request: bytes) -> bytes:
                answer = predict_pb2.PredictResponse.FromString(tower(request))
                vector = predict_pb2.PredictRequest()
                vector.model_spec.name = servers.MODEL
                vector.inputs["query_embedding"].CopyFrom(answer.outputs["query_embedding"])
                return ix(vector.SerializeToString())

            answers = [predict_pb2.PredictResponse.FromString(ask(asked[0])) for ask in (fused, two)]
            ids = [tf.make_ndarray(answer.outputs["item_ids"]).tolist() for answer in answers]
            assert ids[0] == ids[1], "both ways give the same answer"
            for turn in range(2 * repeat):
                for name, ask in (("fused", fused), ("two_services", two))[:: 1 if turn % 2 else -1]:
                    p50[name].append(median_ms(ask, asked, seconds / 2))
        for name, samples in p50.items():
            result.add_samples(name, workload, "called_in_turn_p50", samples, "ms")
        ratios = [both / one for one, both in zip(*p50.values(), strict=True)]
        result.add_samples("two_services_over_fused", workload, "called_in_turn_p50", ratios, "ratio")


def load(result: report.Report, impl: str, workload: str, model: model_server.Model, repeat: int) -> None:
    """Measures wall and CPU time of starting a server of a version."""
    files = [path for path in model.version.rglob("*") if path.is_file()]
    for name in ("load_cold", "load"):
        wall, cpu = [], []
        for _ in range(repeat):
            for path in files if name == "load_cold" else ():
                with path.open("rb") as file:
                    os.fsync(file.fileno())  # pages that are not written yet cannot be dropped from the cache
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            with model_server.serving("dpsr", model) as server:
                wall.append(server.start_seconds)
                cpu.append(server.cpu_seconds())
        result.add_samples(impl, workload, name, wall, "s")
        result.add_samples(impl, workload, f"{name}_cpu", cpu, "s")


@contextlib.contextmanager
def caller(server: servers.Server) -> Iterator[Callable[[bytes], bytes]]:
    """Yields a function that sends a serialized PredictRequest and returns the serialized answer."""
    with grpc.insecure_channel(server.target) as channel:
        yield channel.unary_unary(_PREDICT)


def median_ms(ask: Callable[[bytes], bytes], requests: list[bytes], seconds: float) -> float:
    """Returns the median time in ms of calls that follow one another for some seconds."""
    taken: list[float] = []
    begin = time.perf_counter()
    while (start := time.perf_counter()) - begin < seconds or not taken:
        ask(requests[len(taken) % len(requests)])
        taken.append(time.perf_counter() - start)
    return float(np.median(taken)) * 1000


def _model(version: Path, requests: Path) -> model_server.Model:
    libraries = (str(dpsr_tokenizer.op_library_path()), str(dpsr_export.op_library_path()))
    return model_server.Model(version, libraries, requests)


def bars(result: report.Report, workload: str) -> dict[str, float]:
    """Returns the bars: medians of the ratios of neighbouring turns."""
    return {
        "op_over_bare_faiss": result.value("op_over_bare", workload, "core_ms"),
        "two_service_over_fused_p50": result.value("two_services_over_fused", workload, "called_in_turn_p50"),
        "head2_over_head1": result.value("heads_2_over_1", workload, "core_ms"),
    }


def _define_flags() -> None:
    flags.DEFINE_integer("items", 1_000_000, "number of items in the index", 1000)
    flags.DEFINE_integer("seed", 1, "seed of the vectors")
    flags.DEFINE_string("folder", None, "directory that keeps the vectors; a temporary one if left out")
    flags.DEFINE_integer("repeat", 5, "number of measurements of each figure", 1)
    flags.DEFINE_float("seconds", 3, "length of each measurement in seconds", 0.1)
    flags.DEFINE_boolean("json", False, "prints one JSON object as the last line")
    flags.DEFINE_boolean("quick", False, "only tests the script, with 5,000 items and one short measurement")


def main(_: list[str]) -> None:
    """Runs the benchmark and prints the results."""
    items, repeat, seconds = (5000, 1, 0.5) if FLAGS.quick else (FLAGS.items, FLAGS.repeat, FLAGS.seconds)
    logging.set_verbosity(logging.WARNING)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    result = report.Report("servable", FLAGS.seed, report.hardware("dpsr", "faiss-cpu", "tensorflow", "grpcio"))
    source = Vectors(items, FLAGS.seed)
    queries = source.queries(2 * QUERIES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("index", "filters"):
            (folder / part).mkdir()
        requests = folder / "requests"
        servers.write_requests(requests, texts())
        vectors = source.kept(Path(FLAGS.folder or folder))
        workload = make_index(result, folder / "index", vectors, queries[:QUERIES])
        made = make_servables(folder, folder / "index", queries)
        in_process(result, workload, folder / "index", made, queries, repeat, seconds)
        over_grpc(result, workload, made, requests, repeat, seconds)
        result.bars |= bars(result, workload)
        os.link(folder / "index" / "items.faiss", folder / "filters" / "items.faiss")
        filter_cost.filter_cost(result, vectors, queries[:84], folder / "filters", repeat, seconds / 5)
        made["filters"] = folder / "filters" / "1"
        for impl in ("query_tower", "fused", "filters"):
            load(result, impl, workload, _model(made[impl], requests), repeat)
    result.print(FLAGS.json)


if __name__ == "__main__":
    _define_flags()
    app.run(main)
