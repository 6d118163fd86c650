"""The metrics of the gateway, in the form of dpsr_serving.proxy.metrics. docs/search.md lists them too."""

from __future__ import annotations

METRICS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "dpsr_search_requests_total": (
        "counter",
        ("api", "pipeline", "arm", "code"),
        "Searches answered, by API (rest or grpc), pipeline, experiment arm and gRPC status code.",
    ),
    "dpsr_search_request_seconds": (
        "histogram",
        ("pipeline", "arm"),
        "Seconds from a search to its answer.",
    ),
    "dpsr_search_stage_seconds": ("histogram", ("pipeline", "stage"), "Seconds that a stage took."),
    "dpsr_search_left_out_total": (
        "counter",
        ("pipeline", "stage", "reason"),
        "Stages that were left out, because they were late, failed, or had too much to do (busy).",
    ),
    "dpsr_search_empty_total": ("counter", ("pipeline",), "Searches that found nothing."),
    "dpsr_search_under_way": ("gauge", (), "Searches that are being answered."),
    "dpsr_search_index_cpu_seconds_total": ("counter", (), "Seconds of CPU time in the inverted index."),
    "dpsr_search_rule_reloads_total": (
        "counter",
        ("file", "result"),
        "Times that a file of rules was read again, by result: ok or refused.",
    ),
}
