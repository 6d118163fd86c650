"""The benchmarks of benchmarks/ that the report runs, with the aims of their bars."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from dpsr_tf.report.runner import ExperimentRunner, Result
from dpsr_tf.report.shop import REPOSITORY


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark in the report.

    Attributes:
        title: heading of its section.
        text: what it measures, in a sentence or two. Markdown.
        script: name of the file in benchmarks/, without .py.
        page: the page of docs/ about it.
        flags: flags of a full report; `{data}` stands for the folder of the data sets.
        quick: flags of a quick report, which only shows that the benchmark works. None: a quick report leaves it out.
        keeps: its flag for a directory that keeps what it makes; "" if it has none.
        reads: folders of the data sets that a full report needs. A quick one needs none.
        aims: bar -> `>=` or `<=` and a figure. Bars that have no aim are shown too.
        papers: what the papers report, as rows of (figure, value, setting).
    """

    title: str
    text: str
    script: str
    page: str
    flags: Sequence[str] = ()
    quick: Sequence[str] | None = ("--quick",)
    keeps: str = ""
    reads: Sequence[str] = ()
    aims: Mapping[str, tuple[str, float]] = dataclasses.field(default_factory=dict)
    papers: Sequence[tuple[str, str, str]] = ()


BENCHMARKS: dict[str, Benchmark] = {
    "tokenizer": Benchmark(
        "Tokenizer",
        "Texts that one core tokenizes in a second, compared with tokenizers of other libraries.",
        "tokenizer",
        "tokenizer.md",
        flags=("--data={data}",),
        reads=("multicpr_ecom", "homedepot"),
        aims={"op_over_core": (">=", 0.9)},
    ),
    "store": Benchmark(
        "Store",
        "Size of the store, and examples that one core reads in a second, compared with flat examples.",
        "store",
        "data_format.md",
        aims={
            "bytes_ratio_to_flat": ("<=", 0.10),
            "ratio_to_tfrecord_b64": (">=", 10),
            "ingest_interactions_per_core_second": (">=", 200_000),
        },
    ),
    "training": Benchmark(
        "Training",
        "Examples a core-second beside a plain Estimator, torch and a loop in C++.",
        "training",
        "training.md",
        aims={
            "ratio_to_stock_b64": (">=", 6),
            "ratio_to_stock_b1024": (">=", 2),
            "ratio_to_torch_b64": (">=", 2),
            "ratio_to_limit_b64": (">=", 0.8),
            "cost_10m_over_100k_rows": ("<=", 1.3),
        },
    ),
    "learned_index": Benchmark(
        "Learned index",
        "Precision and recall by bytes an item and by probed lists, of quantizers that are trained with the model and "
        "of those that are trained after it.",
        "learned_index",
        "learned_index.md",
        keeps="out",
        reads=("homedepot",),
        aims={
            "poeem_precision100": (">=", 0.985),
            "poeem_precision100_reconstruction": (">=", 0.978),
            "homedepot_recall100_8_bytes_over_float": (">=", 0.95),
            "homedepot_recall100_32_bytes_over_float": (">=", 0.995),
            "nprobe_ratio_at_equal_recall": ("<=", 0.33),
            "train_rate_over_unquantized": (">=", 0.6),
            "givens_over_svd_cost": ("<=", 0.1),
            "index_seconds_over_embedding_seconds": ("<=", 1.1),
        },
        papers=(
            ("precision@100, exact search", "0.9989", "synthetic data of Poeem's tutorial"),
            ("precision@100, IVF8,PQ8", "0.9610", "the same"),
            ("precision@100, Poeem", "0.9805", "the same"),
        ),
    ),
    "graph": Benchmark(
        "SearchGCN",
        "Towers with and without the click graph, by popularity of the item and by length of the query, their cost, "
        "and LightGCN on Gowalla.",
        "graph",
        "graph.md",
        quick=None,
        keeps="out",
        reads=("gowalla",),
        aims={
            "shop_tail_recall100_gcn_over_dpsr": (">=", 1.03),
            "train_rate_over_dpsr": (">=", 0.25),
            "query_latency_over_dpsr": ("<=", 1.3),
            "gowalla_recall20": (">=", 0.1794),
            "gowalla_ndcg20": (">=", 0.1517),
        },
        papers=(
            ("Recall@20 on Gowalla", "0.1824", "LightGCN, 3 layers"),
            ("NDCG@20 on Gowalla", "0.1547", "the same"),
        ),
    ),
    "rewriting": Benchmark(
        "Query rewriting",
        "What BM25 finds with rewritten queries, and the cost of a rewrite.",
        "rewriting",
        "rewriting.md",
        quick=("--parts=shop", "--seeds=1", "--clicks=4000", "--shop_steps=100"),
        keeps="out",
        reads=("homedepot",),
        aims={
            "misspelt_bm25_rewritten": (">=", 0.68),
            "dev_bm25_rewritten": (">=", 0.72),
            "rewrite_precision": (">=", 0.95),
            "synonym_recall": (">=", 0.8),
        },
    ),
    "ranker": Benchmark(
        "Deep pairwise ranking",
        "Table 4 of the 2019 paper: rankers on the purchases of generated shops, and on judged lists.",
        "ranker",
        "ranking.md",
        quick=("--items=300", "--users=60", "--interactions=6000", "--seeds=1", "--steps=60", "--parts=shop"),
        keeps="out",
        reads=("esci150", "icecat135", "crowdflower261"),
        aims={"rank_core_us_100_items": ("<=", 300)},
        papers=(
            ("session AUC, DPR", "0.870", "JD.com's log, by orders"),
            ("session AUC, XGBoost", "0.852", "the same"),
            ("NDCG@5, DPR", "0.573", "the same"),
            ("NDCG@5, XGBoost", "0.522", "the same"),
        ),
    ),
    "search": Benchmark(
        "One search: the stages",
        "Each stage added to the last: word search, models, both together, rewrites, and the ranker. Quality on judged "
        "queries; the rows `stages` have the latency and the CPU time of a request.",
        "search",
        "search.md",
        quick=None,
        keeps="out",
        reads=("homedepot", "esci150", "icecat135"),
        aims={
            "homedepot_dev_recall100_hybrid": (">=", 0.85),
            "homedepot_misspelt_recall100_hybrid": (">=", 0.81),
            "esci150_recall100_hybrid": (">=", 0.93),
            "icecat135_recall100_hybrid": (">=", 0.80),
            "homedepot_dev_ndcg10_hybrid_over_bm25_low": (">=", 0),
            "homedepot_misspelt_ndcg10_hybrid_over_bm25_low": (">=", 0),
            "esci150_ndcg10_hybrid_over_bm25_low": (">=", 0),
            "icecat135_ndcg10_hybrid_over_bm25_low": (">=", 0),
            "p50_ms": ("<=", 15),
            "p99_ms": ("<=", 60),
            "gateway_cpu_us": ("<=", 500),
            "failed": ("<=", 0),
        },
    ),
    "transfer": Benchmark(
        "Transfer: a shop without clicks",
        "Models of titles alone, on catalogues with judged queries: what a shop without a log gets on its first day.",
        "quality",
        "no_clicks.md",
        flags=(
            "--esci={data}/esci150",
            "--icecat={data}/icecat135",
            "--crowdflower={data}/crowdflower261",
            "--seeds=1,2,3",
        ),
        quick=None,
        keeps="out",
        reads=("esci150", "icecat135", "crowdflower261"),
        aims={"recall100_esci_titles": (">=", 0.91), "recall100_icecat_titles": (">=", 0.79)},
    ),
    "fresh": Benchmark(
        "Fresh items",
        "Items that change while a server answers, at a million items.",
        "fresh",
        "fresh_items.md",
        keeps="out",
        aims={
            "visible_s_p99": ("<=", 2),
            "deleted_returned": ("<=", 0),
            "lost_after_kill": ("<=", 0),
            "p99_ratio_1000_changes_per_s": ("<=", 1.5),
            "recall_over_rebuilt": (">=", 0.995),
        },
    ),
    "index": Benchmark(
        "120 million items",
        "Building and searching an index of the size of the 2019 paper.",
        "index",
        "index.md",
        flags=("--items=120000000",),
        keeps="folder",
        aims={
            "build_120m_wall_s": ("<=", 3453),
            "core_ms_120m_at_ann_recall_0_90": ("<=", 5),
            "core_ms_120m_top100_at_ann_recall_0_90": ("<=", 1.5),
            "rss_gb": ("<=", 12),
        },
        papers=(
            ("build", "3,453 s", "120 million items, 64 cores (2019); the 2020 paper has the same for 15 million"),
            ("first 1,000 items", "9.92 ms", "the same"),
            ("queries a second", "100", "the same"),
        ),
    ),
    "servable": Benchmark(
        "Servable",
        "The fused servable compared with bare FAISS and with two services; filters and heads.",
        "servable",
        "serving.md",
        aims={
            "op_over_bare_faiss": ("<=", 1.05),
            "two_service_over_fused_p50": (">=", 1.6),
            "filter_cost_ratio_worst": ("<=", 3),
            "head2_over_head1": ("<=", 2.1),
        },
    ),
    "model_server": Benchmark(
        "Model server",
        "The model server compared with a server in Python, and with TensorFlow Serving where the variable "
        "TENSORFLOW_MODEL_SERVER has its path.",
        "model_server",
        "model_server.md",
        flags=("--repeat=2", "--seconds=3"),
        quick=None,
        aims={
            "core_us_over_session_run": ("<=", 100),
            "qps_ratio_to_tensorflow_serving_c8": (">=", 1.3),
            "cpu_ratio_to_tensorflow_serving": ("<=", 0.7),
        },
        papers=(("queries a second at 20 ms", "4,000", "DPSR, 64 cores (2020)"),),
    ),
    "bm25_scale": Benchmark(
        "BM25 by the number of items",
        "CPU time of a word search for 1,000 items, and an extrapolation to the 15 million of the paper.",
        "bm25_scale",
        "papers.md",
        keeps="out",
    ),
    "version_swap": Benchmark(
        "Swap of versions",
        "New versions of a servable of a million items, under load over gRPC, REST and the proxy.",
        "version_swap",
        "model_server.md",
        keeps="out",
        aims={"failed": ("<=", 0), "p99_swap_over_steady": ("<=", 2), "rss_20_over_2": ("<=", 1.05)},
    ),
    "soak": Benchmark(
        "Soak",
        "Ten minutes of full load on a servable of a million items, over gRPC, REST and the proxy.",
        "soak",
        "model_server.md",
        keeps="out",
        aims={"failed": ("<=", 0), "rss_end_over_begin": ("<=", 1.05)},
    ),
    "proxy": Benchmark(
        "Proxy",
        "Latency and CPU time that the proxy adds.",
        "proxy",
        "proxy.md",
        aims={
            "added_p50_ms": ("<=", 0.3),
            "qps_per_core": (">=", 12_000),
            "merge_us_4_shards_k1000": ("<=", 300),
            "cpu_ratio_to_nginx": ("<=", 3),
        },
    ),
    "faults": Benchmark(
        "Faults",
        "Requests that fail while servers behind the proxy die, hang and are replaced.",
        "faults",
        "proxy.md",
        aims={
            "failed_kill": ("<=", 0),
            "failed_hang": ("<=", 0),
            "failed_end": ("<=", 0),
            "failed_reload": ("<=", 0),
            "failed_rollout": ("<=", 0),
            "failed_gray": ("<=", 0),
            "failed_shard_rollout": ("<=", 0),
            "mixed_versions": ("<=", 0),
            "p99_hedged_over_unhedged": ("<=", 0.5),
        },
    ),
    "attacks": Benchmark(
        "Attacks",
        "What a well-behaved client notices of hostile ones. Bars that begin with `server` are those of "
        "a model server without a proxy.",
        "attacks",
        "proxy.md",
        aims={
            "crashes": ("<=", 0),
            "victim_failures": ("<=", 0),
            "rss_growth_mb_worst": ("<=", 64),
            "victim_p99_ratio_worst": ("<=", 3),
        },
    ),
    "scale": Benchmark(
        "Clusters",
        "A model of workers and parameter servers from measured costs.",
        "scale",
        "cluster.md",
        quick=None,
        keeps="out",
        papers=(("training", "55 hours", "400 million steps, 40 workers and 5 parameter servers (2020)"),),
    ),
}


def run(runner: ExperimentRunner, names: Sequence[str], quick: bool, data: Path) -> Result:
    """Runs benchmarks one after the other, and returns name -> the JSON object of each.

    Each also has `date`, the day of the measurement, and `command`. One whose data sets are missing has `missing`, the
    missing folders, and nothing else.
    """
    return {name: _run(runner, name, BENCHMARKS[name], quick, data) for name in names}


def command_of(name: str, quick: bool) -> str:
    """Returns the command that a report shows for a benchmark. It leaves out folders and the seed."""
    one = BENCHMARKS[name]
    flags = (one.quick or ()) if quick else one.flags
    return " ".join(["python", f"benchmarks/{one.script}.py", *(f.format(data="DATA") for f in flags), "--json"])


def _run(runner: ExperimentRunner, name: str, one: Benchmark, quick: bool, data: Path) -> Result:
    missing = [] if quick else [folder for folder in one.reads if not (data / folder).is_dir()]
    if missing:
        return {"missing": missing}
    flags = list((one.quick or ()) if quick else one.flags)
    command = command_of(name, quick)
    seed = [f"--seed={runner.seed}"] if runner.seed != 1 and one.script not in _WITHOUT_SEED else []

    def compute() -> Result:
        given = [flag.format(data=data.resolve()) for flag in flags]
        more = [f"--data={data.resolve()}"] if one.reads and given == flags and not quick else []
        if one.keeps:
            kept = runner.out.resolve() / "work" / name
            kept.mkdir(exist_ok=True)
            more.append(f"--{one.keeps}={kept}")
        script = REPOSITORY / "benchmarks" / f"{one.script}.py"
        out = runner.run_script(name, script, "--json", *given, *seed, *more)
        found = json.loads(out.strip().splitlines()[-1])
        return {**found, "date": datetime.date.today().isoformat(), "command": command}

    return runner.result(f"benchmark-{name}", {"benchmark": one.script, "flags": [*flags, *seed]}, compute)


# Their requests do not depend on a seed, or they have a list of seeds of their own.
_WITHOUT_SEED = ("quality", "graph", "rewriting", "model_server", "version_swap", "soak", "proxy", "faults", "attacks")


def met(aim: tuple[str, float], value: float) -> bool:
    """Returns whether a bar meets its aim."""
    sign, limit = aim
    return value >= limit if sign == ">=" else value <= limit


def bar_rows(name: str, bars: Mapping[str, float]) -> list[tuple[str, str, str, str]]:
    """Returns the cells of a table of bars: bar, aim, figure, and whether the aim is met.

    A bar that has an aim and was not measured is in the table too.
    """
    rows = []
    aims = BENCHMARKS[name].aims
    for bar in [*bars, *(bar for bar in aims if bar not in bars)]:
        aim, value = aims.get(bar), bars.get(bar)
        limit = f"{aim[0].replace('<=', '≤').replace('>=', '≥')} {aim[1]:,g}" if aim else ""
        verdict = "" if aim is None or value is None else "yes" if met(aim, value) else "**no**"
        rows.append((f"`{bar}`", limit, "not measured" if value is None else shown(value), verdict))
    return rows


def shown(value: float) -> str:
    """Returns a figure as reports show it: three decimals, or none from 100 on."""
    return f"{value:,.0f}" if abs(value) >= 100 or value == round(value) else f"{value:.3f}"
