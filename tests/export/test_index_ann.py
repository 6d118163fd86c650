"""Choosing, building and measuring FAISS indices, on vectors alone."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpsr_common.errors import CommandError
from dpsr_export import ann
from dpsr_export.index import choose_and_build
from dpsr_export.recall_report import MeasuredIndex, plot, table, write
from dpsr_tf.config import Config, IndexConfig, ServingConfig

DIM = 16


def unit_vectors(n: int, seed: int, dim: int = DIM) -> np.ndarray:
    """Around 40 centres, which are the same for each seed."""
    centres = np.random.default_rng(99).standard_normal((40, dim))
    rng = np.random.default_rng(seed)
    found = centres[rng.integers(0, 40, n)] + 0.5 * rng.standard_normal((n, dim))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """FAISS's threads wait for each other by spinning, which takes minutes where other tests run beside these."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return unit_vectors(3000, 1)


@pytest.fixture(scope="module")
def queries() -> np.ndarray:
    return unit_vectors(50, 2)


def brute_force(vectors: np.ndarray, queries: np.ndarray, found: np.ndarray, k: int) -> float:
    """ann_recall@k by its definition, in float64."""
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    k = min(k, len(vectors))
    floors = np.sort(scores, axis=1)[:, -k]
    right = [
        sum(label >= 0 and row[label] >= floor - 1e-6 for label in labels[:k])
        for row, floor, labels in zip(scores, floors, found, strict=True)
    ]
    return sum(right) / (k * len(queries))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(20, 300),
    k=st.integers(1, 400),
    nprobe=st.integers(1, 8),
    copies=st.integers(1, 20),
    seed=st.integers(0, 10_000),
)
def test_ann_recall_is_that_of_brute_force(n: int, k: int, nprobe: int, copies: int, seed: int) -> None:
    items = np.repeat(unit_vectors(-(-n // copies), seed), copies, axis=0)[:n]  # with ties
    asked = unit_vectors(7, seed + 1)
    index = ann.build(items, "IVF8,Flat")
    ann.set_parameters(index, f"nprobe={nprobe}")
    exact = ann.Exact(items, asked, [k, 3])
    for at in (k, 3):
        found = index.search(asked, min(at, n))[1]
        assert exact.ann_recall(index, at) == pytest.approx(brute_force(items, asked, found, at), abs=1e-9)


@pytest.mark.parametrize(
    ("factory", "least"),
    [
        ("Flat", 1.0),
        ("IVF32,Flat", 0.998),
        ("IVF32_HNSW16,SQ8", 0.9),
        ("IVF32(IVF4,Flat),SQ8", 0.6),
        ("IVF32,PQ8np", 0.6),
        ("OPQ8,IVF32,PQ8np", 0.6),
        ("IVF32,PQ8x4fs,RFlat", 0.9),
        ("OPQ8_16,IVF32,PQ8x4fs,Refine(SQfp16)", 0.9),
        ("HNSW16", 0.95),
    ],
)
@pytest.mark.parametrize("two_levels", [False, True])
def test_every_kind_of_index(
    vectors: np.ndarray,
    queries: np.ndarray,
    factory: str,
    least: float,
    two_levels: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ann, "_LATENCY_SEARCHES", 3)
    if two_levels:
        monkeypatch.setattr(ann, "_TWO_LEVEL_LISTS", 16)
    index = ann.build(vectors, factory)
    assert index.is_trained and index.ntotal == len(vectors)
    exact = ann.Exact(vectors, queries, [10, 100])
    found = ann.measure_settings(index, exact, queries, 10)
    assert max(setting.ann_recall[100] for setting in found) >= least
    assert all(0 < setting.p50_ms <= setting.p99_ms for setting in found)
    if "IVF" in factory:
        assert found[0].ann_recall[100] < max(setting.ann_recall[100] for setting in found)
    # What is written is what was measured.
    chosen = ann.choose(found, 10, 0.5)
    faiss.write_index(index, str(tmp_path / "index"))
    again = faiss.read_index(str(tmp_path / "index"))
    ann.set_parameters(again, chosen.parameters)
    assert exact.ann_recall(again, 10) == chosen.ann_recall[10]


@pytest.mark.parametrize("quantizer", ["", "_HNSW32"])
def test_the_coarse_quantizer_looks_as_hard_as_nprobe_needs(quantizer: str) -> None:
    """FAISS's efSearch ends the search of a graph long before it has found nprobe lists."""
    index = ann.build(unit_vectors(6000, 1), f"IVF256{quantizer},Flat")
    grid = [dict(part.split("=") for part in text.split(",")) for text in next(ann._grids(index))]
    assert [int(setting["nprobe"]) for setting in grid] == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    efforts = [int(setting.get("quantizer_efSearch", 0)) for setting in grid]
    assert efforts == ([max(16, 2 * int(setting["nprobe"])) for setting in grid] if quantizer else [0] * len(grid))
    asked = unit_vectors(50, 2)
    exact = ann.Exact(unit_vectors(6000, 1), asked, [100])
    assert ann.measure_settings(index, exact, asked, 100)[-1].ann_recall[100] > 0.998


@pytest.mark.parametrize("factory", ["IVF64,Flat", "IVF64_HNSW16,SQ8", "IVF64,PQ8x4fs,RFlat"])
def test_assignment_in_two_levels_is_that_of_the_quantizer(
    vectors: np.ndarray, factory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = ann.build(vectors, factory)
    monkeypatch.setattr(ann, "_TWO_LEVEL_LISTS", 64)
    monkeypatch.setattr(ann, "two_level_kmeans", lambda *_: quantizer(one).reconstruct_n(0, 64))
    two = ann.build(vectors, factory)
    assert type(quantizer(two)) is type(quantizer(one)) and quantizer(two).ntotal == 64
    same = sum(np.isin(lists(two, i), lists(one, i)).sum() for i in range(64))
    assert same >= 0.98 * len(vectors)


@pytest.mark.parametrize(
    "factory", ["IVF64,Flat", "IVF64_HNSW16,SQ8", "IVF64,PQ8np", "OPQ8,IVF64,PQ8np", "IVF64,PQ8x4fs", "IVF64,SQ8,RFlat"]
)
def test_counted_lists_are_those_of_faiss(
    vectors: np.ndarray, factory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ann, "_BLOCK", 1000)
    monkeypatch.setattr(ann, "_TWO_LEVEL_LISTS", 64)
    made = []
    for count in (True, False):
        if not count:
            monkeypatch.setattr(ann, "_growing_lists", lambda _: None)
        index = ann.build(vectors, factory)
        faiss.write_index(index, str(tmp_path / "index"))
        made.append((tmp_path / "index").read_bytes())
    assert made[0] == made[1] and index.ntotal == len(vectors)


def test_counted_lists_take_no_more_than_their_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ann, "_TWO_LEVEL_LISTS", 4)
    many = np.tile(unit_vectors(10_000, 5), (20, 1))
    index = ann.make("IVF4,Flat", DIM)
    ann.train(index, many[:10_000])

    def blocks() -> Iterator[np.ndarray]:
        return (many[begin : begin + 1000] for begin in range(0, len(many), 1000))

    before = resident()
    ann.add(index, blocks)
    # Growing by doubling takes up to twice as much: a third more here.
    assert resident() - before < 1.1 * len(many) * (4 * DIM + 8)
    assert index.ntotal == len(many)


def resident() -> int:
    """Memory that this process has allocated, in bytes."""
    fields = Path("/proc/self/status").read_text().split()
    return int(fields[fields.index("RssAnon:") + 1]) * 1024


def quantizer(index: faiss.Index) -> faiss.Index:
    return faiss.downcast_index(ann._ivf(index).quantizer)


def lists(index: faiss.Index, number: int) -> np.ndarray:
    """Positions of the vectors in one inverted list."""
    found = ann._ivf(index).invlists
    return faiss.rev_swig_ptr(found.get_ids(number), found.list_size(number)).copy()


@pytest.mark.parametrize("factory", ["IVF16384,SQ8", "IVF16384,PQ4x4fs"])
def test_many_threads_find_the_lists_of_few_queries(factory: str) -> None:
    # index.search finds 2 of 100 results that one thread finds.
    vectors = unit_vectors(40_000, 1)[:, :8].copy()
    index = ann.make(factory, 8)
    faiss.extract_index_ivf(index).quantizer.add(vectors[:16_384])
    index.train(vectors)
    index.add(vectors)
    ann.set_parameters(index, "nprobe=32")
    found = []
    for threads in (1, 16):
        faiss.omp_set_num_threads(threads)
        found.append(ann.search(index, vectors[:15], 10)[1])
        assert faiss.omp_get_max_threads() == threads
    np.testing.assert_array_equal(found[0], found[1])


def test_two_level_kmeans_is_about_as_good_as_one_level(vectors: np.ndarray) -> None:
    def mean_product(centroids: np.ndarray) -> float:
        return float((vectors @ centroids.T).max(axis=1).mean())

    flat = faiss.Kmeans(DIM, 100, niter=10, spherical=True, seed=1, min_points_per_centroid=1)
    flat.train(vectors)
    found = ann.two_level_kmeans(vectors, 100)
    assert found.shape == (100, DIM)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)
    assert mean_product(found) > mean_product(flat.centroids) - 0.02
    np.testing.assert_array_equal(found, ann.two_level_kmeans(vectors, 100))


@pytest.mark.parametrize(("n", "clusters"), [(1, 1), (50, 50), (51, 50), (200, 3)])
def test_two_level_kmeans_of_few_vectors(n: int, clusters: int) -> None:
    assert ann.two_level_kmeans(unit_vectors(n, 3), clusters).shape == (clusters, DIM)


def test_estimated_bytes_are_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = unit_vectors(6000, 4)
    for two_level_lists in (1 << 20, 1):
        monkeypatch.setattr(ann, "_TWO_LEVEL_LISTS", two_level_lists)
        for candidate in ann.candidates(*many.shape, 0.95)[:3]:  # rotations take long to learn
            faiss.write_index(ann.build(many, candidate.factory), str(tmp_path / "index"))
            size = (tmp_path / "index").stat().st_size
            assert candidate.bytes == pytest.approx(size, rel=0.05), candidate


def first(items: int, target: float = 0.95, memory: float = 0) -> str:
    return next(c.factory for c in ann.candidates(items, 64, target, memory) if not c.verdict)


def test_auto_goes_by_items_memory_and_target() -> None:
    assert first(1000) == first(50_000) == "Flat"
    assert first(50_001) == "IVF1024,SQ8"
    assert first(1_000_000) == "IVF4096,SQ8"
    assert first(15_000_000) == first(33_000_000) == "IVF16384,SQ8"
    assert first(34_000_000) == first(120_000_000) == "IVF32768_HNSW32,SQ8"
    assert first(1_000_000, target=0.995) == "IVF4096,Flat"
    assert first(1_000_000, target=0.995, memory=100e6) == "IVF4096,SQ8"
    assert first(1_000_000, memory=50e6) == "OPQ32,IVF4096,PQ32np"
    assert first(1_000_000, memory=30e6) == "OPQ16,IVF4096,PQ16np"
    assert all(c.verdict for c in ann.candidates(1_000_000, 64, 0.95, 10e6))
    slow = ann.candidates(1_000_000, 64, 0.95)[0]
    assert slow.factory == "Flat" and "slow above 50,000" in slow.line() and "256.0 MB" in slow.line()


def config(factory: str = "auto", k: int = 10, **index: object) -> Config:
    return dataclasses.replace(
        Config(),
        index=IndexConfig(factory=factory, **index),  # type: ignore[arg-type]
        serving=ServingConfig(k=k),
    )


def test_auto_takes_longer_codes_where_short_ones_miss_the_target(
    vectors: np.ndarray, queries: np.ndarray, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(ann, "_FLAT_ITEMS", 0)
    monkeypatch.setattr(ann, "_SQ8_RECALL", 1.0)  # so that 8 bits are tried
    built = choose_and_build(vectors, queries, config(recall_target=1.0))
    assert built.factory == "IVF256,Flat" and built.chosen.ann_recall[10] == 1.0
    printed = capsys.readouterr().out
    assert (
        "index.factory auto chooses IVF256,SQ8, the first one that fits" in printed
        and "IVF256,SQ8: ann_recall@10 is" in printed
    )


def test_auto_says_what_is_needed_where_nothing_fits(vectors: np.ndarray, queries: np.ndarray) -> None:
    with pytest.raises(
        CommandError,
        match=r"index.memory is 1e-06 GB, but the smallest index of 3,000 items .* OPQ4,IVF256,PQ4np, takes",
    ):
        choose_and_build(vectors, queries, config(memory=1e-6))


def test_the_cheapest_setting_that_meets_the_target_is_chosen(vectors: np.ndarray, queries: np.ndarray) -> None:
    built = choose_and_build(vectors, queries, config("IVF32,Flat", k=100, recall_target=0.9))
    good = [setting for setting in built.settings if setting.ann_recall[100] >= 0.9]
    assert built.chosen in good and built.chosen.p50_ms == min(setting.p50_ms for setting in good)
    assert 1 <= len(good) < len(built.settings)
    assert f"nprobe={faiss.extract_index_ivf(built.index).nprobe}" == built.chosen.parameters
    assert f"* {built.chosen.parameters} " in table(built)


def test_a_target_out_of_reach_gives_the_best_and_says_so(vectors: np.ndarray, queries: np.ndarray) -> None:
    built = choose_and_build(vectors, queries, config("IVF32,PQ4np", recall_target=1.0))
    assert built.chosen.ann_recall[10] == max(setting.ann_recall[10] for setting in built.settings) < 1
    assert "ann_recall@10 does not reach index.recall_target=1" in table(built)


def test_given_parameters_are_taken(vectors: np.ndarray, queries: np.ndarray) -> None:
    built = choose_and_build(vectors, queries, config("IVF32,Flat", parameters="nprobe=3", recall_target=0.99))
    assert built.chosen.parameters == "nprobe=3" == built.settings[0].parameters and len(built.settings) > 2
    assert faiss.extract_index_ivf(built.index).nprobe == 3
    with pytest.raises(CommandError, match=r"FAISS refuses index\.parameters 'nprobes=3'"):
        choose_and_build(vectors, queries, config("IVF32,Flat", parameters="nprobes=3"))


@pytest.mark.parametrize("factory", ["Flatt", "IVF4000,Flat", "IVF32,PQ5"])
def test_what_faiss_refuses(vectors: np.ndarray, factory: str) -> None:
    with pytest.raises(CommandError, match=rf"FAISS (refuses|cannot build) index.factory '{factory}'") as error:
        ann.build(vectors, factory)
    assert "\n" not in str(error.value)


def test_latency_leaves_the_number_of_threads_alone(vectors: np.ndarray, queries: np.ndarray) -> None:
    before = faiss.omp_get_max_threads()
    ann.latency(ann.build(vectors, "Flat"), queries, 5)
    assert faiss.omp_get_max_threads() == before


def test_the_plot_is_svg_with_a_dot_a_setting() -> None:
    found = [ann.Setting(f"nprobe={i}", {10: i / 4, 100: i / 5}, 0.1 * i, 1.0) for i in (1, 2, 4)]
    root = ElementTree.fromstring(plot(found, "IVF4,Flat"))
    svg = "{http://www.w3.org/2000/svg}"
    _, _, width, height = map(float, root.get("viewBox", "").split())
    groups = [root.find(f".//{svg}g[@id='ann_recall@{k}']") for k in (10, 100)]
    dots = [dot for group in groups if group is not None for dot in group.iter(f"{svg}use")]
    assert len(dots) == 6 and len({(dot.get("x"), dot.get("y")) for dot in dots}) == 6
    assert all(0 <= float(dot.get("x", -1)) <= width and 0 <= float(dot.get("y", -1)) <= height for dot in dots)


def test_without_matplotlib_the_report_has_no_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [ann.Setting(f"nprobe={i}", {10: i / 4}, 0.1 * i, 1.0) for i in (1, 2)]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write(tmp_path, MeasuredIndex(None, "IVF4,Flat", found, found[0], 10, 0.2), "two queries")
    assert [path.name for path in tmp_path.iterdir()] == ["recall.json"]
    assert "recall.svg is not written" in capsys.readouterr().out


def test_a_faiss_without_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(faiss, "StandardGpuResources", raising=False)  # of a faiss-gpu, if that is what is installed
    with pytest.raises(
        CommandError, match="--device=gpu: the installed FAISS does not support GPUs; install faiss-gpu"
    ):
        ann.check_device("gpu")
