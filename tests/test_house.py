"""The rules of the house: who may import whom, and what stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {
    "dpsr_tokenizer": ROOT / "tokenizer_cc" / "dpsr_tokenizer",
    "dpsr_tf": ROOT / "dpsr_tf",
    "dpsr_export": ROOT / "export" / "dpsr_export",
    "dpsr_serving": ROOT / "serving" / "dpsr_serving",
}
MAY_IMPORT = {
    "dpsr_tokenizer": set(),
    "dpsr_tf": {"dpsr_tokenizer"},
    "dpsr_export": {"dpsr_tokenizer", "dpsr_tf"},
    "dpsr_serving": set(),
}


def imports(path: Path) -> set[str]:
    """First part of every module that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_they_may(room: str) -> None:
    files = sorted(ROOMS[room].rglob("*.py"))
    assert files
    for path in files:
        others = imports(path) & (set(ROOMS) - {room})
        assert others <= MAY_IMPORT[room], f"{path} imports {others}"


def test_serving_imports_no_tensorflow() -> None:
    for path in sorted(ROOMS["dpsr_serving"].rglob("*.py")):
        assert not imports(path) & {"tensorflow", "tensorflow_serving", "faiss"}, path


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("dpsr_common.command_line", {"tensorflow", "pyarrow", "grpc", "numpy"}),
        ("dpsr_tokenizer", {"tensorflow", "dpsr_tf"}),
        ("dpsr_export", {"tensorflow", "faiss"}),
        ("dpsr_serving.client, dpsr_serving.query, dpsr_serving.model_server", {"tensorflow", "dpsr_tf"}),
        ("dpsr_serving.proxy.server, dpsr_serving.proxy.command", {"tensorflow", "dpsr_tf", "numpy"}),
        ("dpsr_tf.data.ingest, dpsr_tf.evaluation.evaluate", {"tensorflow", "dpsr_export", "dpsr_serving"}),
    ],
)
def test_what_an_import_loads(modules: str, heavy: set[str]) -> None:
    script = f"import sys, {modules}; print(*(name for name in {sorted(heavy)} if name in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert loaded.split() == []


def test_cpp_headers_respect_the_rooms() -> None:
    """The same rule for C++: the tokenizer includes nothing of ours, the server knows nothing of DPSR's models."""
    may_include = {
        "tokenizer_cc": {"tokenizer_cc"},
        "dpsr_tf": {"tokenizer_cc", "dpsr_tf"},
        "export": {"tokenizer_cc", "dpsr_tf", "export"},
        # Status is shared; no model, store or index header may be.
        "serving": {"serving", "common/status.h"},
    }
    for room, allowed in may_include.items():
        for path in sorted((ROOT / room).rglob("*.h")) + sorted((ROOT / room).rglob("*.cc")):
            for line in path.read_text().splitlines():
                if line.startswith('#include "'):
                    header = line.split('"')[1]
                    if header.partition("/")[0] in may_include:
                        assert header in allowed or header.partition("/")[0] in allowed, f"{path} includes {header}"
