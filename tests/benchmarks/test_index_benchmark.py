"""The vectors that benchmarks of the index share, and benchmarks/index.py in its quick form."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest
from absl import app

from dpsr_export import ann

SCRIPT = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "index.py"
sys.path.append(str(SCRIPT.parent))
benchmark = importlib.import_module("index")
peers = importlib.import_module("index_peers")
report = importlib.import_module("report")
vectors = importlib.import_module("vectors")


def test_vectors_are_those_of_the_seed(tmp_path: Path) -> None:
    items = vectors.Vectors(3000, 1).write(tmp_path / "items.npy")
    assert items.shape == (3000, 64) and items.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(items, axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(items, np.concatenate(list(vectors.Vectors(3000, 1).blocks())))
    assert not np.isclose(items[0], next(vectors.Vectors(3000, 2).blocks())[0]).all()
    queries = vectors.Vectors(3000, 1).queries(50)
    np.testing.assert_array_equal(queries[:20], vectors.Vectors(3000, 1).queries(50)[:20])
    assert (queries @ items.T).max() < 0.999, "queries are no items"


def test_vectors_come_in_blocks_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "_BLOCK", 1000)
    blocks = list(vectors.Vectors(2500, 1).blocks())
    assert [len(block) for block in blocks] == [1000, 1000, 500]
    assert (blocks[0] @ blocks[1].T).max() < 0.999


def test_vectors_have_the_structure_that_is_written_there() -> None:
    catalogue = vectors.Vectors(1_000_000, 1)
    assert len(catalogue.probabilities) == 2000
    sizes = catalogue.probabilities * catalogue.items
    np.testing.assert_allclose([sizes.sum(), sizes[0] / sizes[-1]], [1e6, 2049 / 50])
    found, topics = catalogue._draw(20_000, 1)
    share = np.bincount(topics, minlength=2000)[:100].sum() / len(topics)
    assert share == pytest.approx(catalogue.probabilities[:100].sum(), abs=0.01)
    order = np.argsort(topics, kind="stable")
    same = topics[order][1:] == topics[order][:-1]
    cosines = (found[order][1:] * found[order][:-1]).sum(axis=1)
    assert cosines[same].mean() == pytest.approx(0.67, abs=0.03)
    assert (found[:10_000] * found[10_000:]).sum(axis=1).mean() == pytest.approx(0, abs=0.05)
    # Within a topic a few directions hold most of the variance, and others do in another topic.
    axes = []
    for topic in (0, 32):
        deviation = found[topics == topic].std(axis=0)
        assert deviation.max() > 2.5 * deviation.min()
        axes.append(deviation)
    assert np.corrcoef(axes)[0, 1] < 0.5


def test_the_first_factory_is_what_auto_takes() -> None:
    for items in (1_000_000, 15_000_000):
        chosen = next(c.factory for c in ann.candidates(items, 64, 0.95) if not c.verdict)
        assert benchmark.factories(items)[0] == chosen
    assert {"HNSW32", "Flat"} < set(benchmark.factories(1_000_000))
    assert "HNSW32" not in benchmark.factories(15_000_000) and "Flat" in benchmark.factories(15_000_000)


def test_bars_are_of_the_first_factory_where_recall_is_reached() -> None:
    result = report.Report("index", 1, {})
    for factory, wall in (("a", 3.0), ("b", 2.0)):
        result.add(factory, "10 x 64", "build_wall", wall, "s")
        for setting, recall, cost in (("x", 0.91, 1.0), ("y", 0.93, 0.5), ("z", 0.9501, 2.0)):
            result.add(factory, setting, "ann_recall@1000", recall - (factory == "b") / 50, "")
            result.add(factory, setting, "core_ms", cost, "ms")
    assert benchmark.bars(result, "a", 10) == {
        "build_wall_s": 3.0,
        "core_ms_at_ann_recall_0_90": 0.5,
        "core_ms_at_ann_recall_0_95": 2.0,
    }
    assert benchmark.bars(result, "b", 10) == {"build_wall_s": 2.0, "core_ms_at_ann_recall_0_90": 0.5}


def test_bars_of_many_items_are_named_by_their_number() -> None:
    result = report.Report("index", 1, {})
    for metric, value in (("build_wall", 5.0), ("peak_memory", 9.0), ("cold_start", 0.5)):
        result.add("a", "120,000,000 x 64", metric, value, "")
    for metric, value in (("ann_recall@1000", 0.92), ("ann_recall@100", 0.97), ("core_ms", 4.0), ("core_ms@100", 2.0)):
        result.add("a", "x", metric, value, "")
    assert benchmark.bars(result, "a", 120_000_000) == {
        "build_120m_wall_s": 5.0,
        "core_ms_120m_at_ann_recall_0_90": 4.0,
        "core_ms_120m_top100_at_ann_recall_0_90": 2.0,
        "rss_gb": 9.0,
        "cold_start_s": 0.5,
    }


def test_a_stream_is_measured_as_mapped_vectors_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "_BLOCK", 1000)
    catalogue = vectors.Vectors(3500, 1)
    mapped, queries = catalogue.kept(tmp_path), catalogue.queries(20)
    streamed = benchmark.StreamedExact(catalogue.blocks(), queries, [10, 100])
    exact = ann.Exact(mapped, queries, [10, 100])
    index, watch = benchmark.build(catalogue, None, "IVF16,Flat")
    assert index.ntotal == 3500 and min(watch.wall, watch.core) > 0
    for nprobe in ("nprobe=2", "nprobe=16"):
        ann.set_parameters(index, nprobe)
        for k in (10, 100):
            assert streamed.ann_recall(index, k) == pytest.approx(exact.ann_recall(index, k))
    assert streamed.ann_recall(index, 10) == 1
    assert benchmark.cold_start(written(index, tmp_path), queries[:1]) > 0


def written(index: faiss.Index, folder: Path) -> Path:
    faiss.write_index(index, str(folder / "index"))
    return folder / "index"


def test_a_stopwatch_leaves_work_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    watch = benchmark.Stopwatch()

    def drawn() -> Iterator[np.ndarray]:
        for _ in range(3):
            now[0] += 50
            yield np.zeros(1)

    for _ in watch.leave_out(drawn()):
        now[0] += 2
    watch.stop()
    assert watch.wall == 6


def test_peak_memory_is_what_was_held_for_a_while() -> None:
    with benchmark.peak_memory() as before:
        pass
    with benchmark.peak_memory() as found:
        held = np.ones(50_000_000, np.uint8)
        for _ in range(40):
            held += 1
        del held
    assert found[0] - before[0] == pytest.approx(0.05, abs=0.02)


class Scan(peers.Peer):
    """A peer that scores the first `rows` of all vectors."""

    MODULE, DEFAULTS = "json", {"M": "1"}

    def _build(self, vectors: np.ndarray, options: dict[str, str], threads: int) -> None:
        self.vectors = vectors

    def settings(self, k: int) -> Iterator[list[str]]:
        yield [f"rows={rows}" for rows in (2000, 2800, 3600, 3900, 4000)]

    def search(self, x: np.ndarray, k: int) -> tuple[None, np.ndarray]:
        rows = int(self.setting.removeprefix("rows="))
        return None, np.argsort(-(x @ self.vectors[:rows].T), axis=1)[:, :k]

    def write(self, path: Path) -> int:
        path.mkdir()
        (path / "vectors").write_bytes(self.vectors.tobytes())
        return self.vectors.nbytes


def measured_peer(factory: str, tmp_path: Path) -> dict[str, dict[str, float]]:
    """Returns the rows of a peer by metric and workload."""
    catalogue = vectors.Vectors(4000, 1)
    items, queries = catalogue.kept(tmp_path), catalogue.queries(20)
    result = report.Report("index", 1, {})
    benchmark.measure_peer(result, items, queries, ann.Exact(items, queries, [100, 1000]), factory, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["4000-1.npy"], "what was written is removed"
    found: dict[str, dict[str, float]] = {}
    for row in result.rows:
        assert row["impl"] == factory
        found.setdefault(row["metric"], {})[row["workload"]] = row["value"]
    return found


def test_the_cheapest_setting_of_a_peer_that_reaches_the_recall_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(peers._KINDS, "scan", Scan)
    monkeypatch.setattr(benchmark, "core_ms", lambda index, queries, k: float(index.setting.removeprefix("rows=")) + k)
    found = measured_peer("scan:M=2", tmp_path)
    assert found["bytes_per_item"] == {"4,000 x 64": 256}
    # The rows are drawn at random, so the first 3,600 of 4,000 have about 0.9 of the results.
    for k, metric in ((1000, "core_ms"), (100, "core_ms@100")):
        recalls = found[f"ann_recall@{k}"]
        assert {name: cost - k for name, cost in found[metric].items()} == {
            name: float(name.split("rows=")[1].split(",")[0]) for name in recalls
        }
        assert f"4,000 x 64, rows=3900, top {k}" in recalls and min(recalls.values()) >= 0.9
        assert f"4,000 x 64, rows=2800, top {k}" not in recalls


def test_the_setting_nearest_to_a_recall_that_none_reaches() -> None:
    found = [("a", 0.7, 1.0), ("b", 0.8, 2.0), ("c", 0.92, 4.0), ("d", 0.93, 3.0)]
    assert benchmark.cheapest_of(found, 0.9)[0] == "d" and benchmark.cheapest_of(found, 0.95)[0] == "d"
    assert benchmark.cheapest_of(found, 0.75)[0] == "b"


@pytest.mark.parametrize(
    ("factory", "fewest_bytes", "most_bytes"),
    [
        ("usearch:M=16,ef=64,codes=i8", 64 + 64, 300),
        ("usearch:M=8", 256 + 64, 500),
        ("hnswlib:M=16,ef=64", 256 + 64, 500),
        ("scann:leaves=60,codes=int8", 64, 90),
        ("scann:leaves=60,codes=2,reorder=int8,soar=1.5", 64 + 16, 200),
    ],
)
def test_a_peer_finds_what_exact_search_finds(factory: str, fewest_bytes: int, most_bytes: int, tmp_path: Path) -> None:
    pytest.importorskip(peers._KINDS[factory.partition(":")[0]].MODULE)
    found = measured_peer(factory, tmp_path)
    for k in (100, 1000):
        assert 0.95 <= max(found[f"ann_recall@{k}"].values()) <= 1
    assert fewest_bytes < found["bytes_per_item"]["4,000 x 64"] < most_bytes
    assert min(*found["core_ms"].values(), *found["core_ms@100"].values()) > 0


def test_peers_that_cannot_be_measured_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not any(peers.is_peer(factory) for factory in benchmark.factories(1_000_000))
    assert all(peers.is_peer(factory) for factory in peers.CHOSEN)
    monkeypatch.setitem(peers._KINDS, "scan", Scan)
    assert peers.options_of("scan") == {"M": "1"} and peers.options_of("scan:M=3") == {"M": "3"}
    for given in ("M", "ef=3", "M="):
        with pytest.raises(app.UsageError, match="cannot be set; scan has scan:M=1"):
            peers.options_of(f"scan:{given}")
    monkeypatch.setattr(Scan, "MODULE", "not_installed")
    with pytest.raises(app.UsageError, match=r"needs scan .* install it with"):
        peers.options_of("scan:M=3")


def test_peers_of_a_stream_are_refused() -> None:
    command = [sys.executable, SCRIPT, "--items=20000000", "--factories=hnswlib:M=16"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "200"})
    assert done.returncode == 1 and "cannot be built from a stream" in done.stdout + done.stderr


@pytest.mark.long
@pytest.mark.slow
def test_the_json_line(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--json", "--quick", f"--folder={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == ["benchmark", "schema", "seed", "hardware", "rows", "bars"]
    assert (found["benchmark"], found["schema"], found["seed"]) == ("index", 1, 1)
    assert list(found["bars"]) == ["build_wall_s", "core_ms_at_ann_recall_0_90", "core_ms_at_ann_recall_0_95"]
    rows = {}
    for row in found["rows"]:
        rows.setdefault(row["metric"], {})[row["impl"], row["workload"]] = row["value"]
    of_few, of_many = rows["ann_recall@100"], rows["ann_recall@1000"]
    assert min(max(of_few[key], of_many[key]) for key in of_many) > 0.9 and max(of_many.values()) > 0.95
    assert rows["ann_recall@1000"]["Flat", "20,000 x 64, -"] == 1
    assert 0.07 < rows["size"]["IVF256,SQ8", "20,000 x 64"] * 1e9 / (20_000 * 1000) < 0.08
    assert all(0 < rows["p50"][key] <= rows["p99"][key] and rows["wall_qps"][key] > 0 for key in rows["p50"])
    # What was measured is kept, and nothing else.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["20000-1-100.json", "20000-1.npy"]
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(again.stdout.splitlines()[-1])["rows"] == found["rows"] and "measured" not in again.stderr
