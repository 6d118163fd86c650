"""The walls of the house: who may import whom, as docs/architecture.md says it, and what stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURE = ROOT / "docs" / "architecture.md"
# Where the packages' folders lie.
PACKAGES = {
    "dpsr_common": ROOT / "common",
    "dpsr_tokenizer": ROOT / "tokenizer_cc",
    "dpsr_tf": ROOT,
    "dpsr_export": ROOT / "export",
    "dpsr_serving": ROOT / "serving",
}
MODULES = {
    ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__"): path
    for package, folder in PACKAGES.items()
    for path in sorted((folder / package).rglob("*.py"))
}
# Functions that import a module by a name that the code computes.
DYNAMIC_IMPORTS = {"import_module", "__import__", "run_module", "run_path", "exec_module", "load_module"}


def rooms() -> dict[str, tuple[list[str], list[str], list[str]]]:
    """Room -> its Python modules, its C++ folders, the rooms it may import; the table of the architecture page."""
    table = re.search(r"^\| room \|.*\n\|---.*\n((?:\|.*\n)+)", ARCHITECTURE.read_text(), re.MULTILINE)
    assert table, f"{ARCHITECTURE}: has no table of rooms"
    found = {}
    for line in table[1].splitlines():
        room, python, cpp, allowed = (cell.strip() for cell in line.strip("|").split("|"))
        names = [] if allowed == "nothing" else [name.strip() for name in allowed.split(",")]
        found[room] = (re.findall(r"`([^`]+)`", python), re.findall(r"`([^`]+)`", cpp), names)
    return found


ROOMS = rooms()


def room_of_module(module: str) -> str:
    """The room whose module prefix is the longest."""
    owners = {
        prefix: room
        for room, (prefixes, _, _) in ROOMS.items()
        for prefix in prefixes
        if module == prefix or module.startswith(f"{prefix}.")
    }
    assert owners, f"{module} belongs to no room of {ARCHITECTURE.name}"
    return owners[max(owners, key=len)]


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports, wherever in the file: those of ours in full, of others the first part."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}:{node.lineno}: a relative import; write the whole name"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in inside]
        else:
            continue
        yield from (name if name in MODULES else name.partition(".")[0] for name in names)


def circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """Nodes of one circle of a graph, in order; [] where there is none."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return path[path.index(node) :]
        if node in done:
            return []
        for neighbour in graph.get(node, ()):
            if found := visit(neighbour, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in graph if (found := visit(node, []))), [])


def test_circle_finds_one() -> None:
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c"]
    assert circle({"a": ["b", "c"], "b": ["c"], "c": []}) == []


def test_rooms_stand_in_order() -> None:
    names = list(ROOMS)
    for room, (_, _, allowed) in ROOMS.items():
        assert set(allowed) <= set(names[: names.index(room)]), f"{room} may import a room that stands below it"


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_rooms_that_theirs_may(module: str) -> None:
    room = room_of_module(module)
    allowed = {room, *ROOMS[room][2]}
    for imported in imports(MODULES[module]):
        if imported in MODULES:
            assert room_of_module(imported) in allowed, f"{module} ({room}) imports {imported}"


def test_modules_import_in_no_circle() -> None:
    graph = {
        module: [name for name in imports(path) if name in MODULES and name != module]
        for module, path in MODULES.items()
    }
    assert circle(graph) == []


def test_every_room_is_used() -> None:
    assert {room_of_module(module) for module in MODULES} == set(ROOMS)


# The one module that imports what a user names: `model.encoder`.
IMPORTS_CODE_OF_USERS = "dpsr_tf.models.text_encoder"


@pytest.mark.parametrize("module", sorted({*MODULES} - {IMPORTS_CODE_OF_USERS}))
def test_nothing_is_imported_by_a_computed_name(module: str) -> None:
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        assert name not in DYNAMIC_IMPORTS, f"{module}:{node.lineno}: {name}; register an entry point"  # type: ignore[attr-defined]


def test_entry_points_belong_to_whom_they_should() -> None:
    """An entry point is loaded where its group is defined; that room is the lowest of all that register there."""
    loaders = {}
    for module, path in MODULES.items():
        for group in re.findall(r'^\w*GROUP\w* = "(dpsr\.\w+)"', path.read_text(), re.MULTILINE):
            loaders[group] = module
    text = (ROOT / "pyproject.toml").read_text()
    for group, lines in re.findall(r'^\[project\.entry-points\."([^"]+)"\]\n((?:.+\n)+)', text, re.MULTILINE):
        assert group in loaders, f"nobody loads {group}"
        for name, module in re.findall(r'^(\w+) = "([\w.]+)', lines, re.MULTILINE):
            assert module in MODULES, f"{group}: {name} is registered as {module}, which is not there"


def test_serving_imports_no_tensorflow() -> None:
    for module, path in MODULES.items():
        if room_of_module(module) in ("serving", "common", "tokenizer") and module != "dpsr_tokenizer.tf_ops":
            assert not {"tensorflow", "tensorflow_serving", "faiss"} & set(imports(path)), module


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("dpsr_common", {"tensorflow", "numpy", "yaml", "google", "absl", "dpsr_common.packed_file"}),
        ("dpsr_common.command_line", {"tensorflow", "pyarrow", "grpc", "numpy"}),
        ("dpsr_tokenizer", {"tensorflow", "dpsr_tf"}),
        ("dpsr_export", {"tensorflow", "faiss"}),
        ("dpsr_serving.client, dpsr_serving.query, dpsr_serving.model_server", {"tensorflow", "dpsr_tf"}),
        ("dpsr_serving.proxy.server, dpsr_serving.proxy.command", {"tensorflow", "dpsr_tf", "numpy"}),
        ("dpsr_serving.proxy.server, dpsr_serving.proxy.command", {"grpc", "opentelemetry", "dns"}),
        ("dpsr_serving.gateway.command", {"tensorflow", "dpsr_tf", "dpsr_export"}),
        ("dpsr_serving.client, dpsr_serving.query", {"aiohttp", "tantivy"}),
        ("dpsr_tf.data.ingest, dpsr_tf.evaluation.evaluate", {"tensorflow", "dpsr_export", "dpsr_serving"}),
    ],
)
def test_what_an_import_loads(modules: str, heavy: set[str]) -> None:
    script = f"import sys, {modules}; print(*(name for name in {sorted(heavy)} if name in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert loaded.split() == []


# C++.


def sources() -> dict[str, Path]:
    """Our headers and C++ files by the name that an #include gives them."""
    folders = {folder.partition("/")[0] for _, folders, _ in ROOMS.values() for folder in folders}
    return {
        str(path.relative_to(ROOT)): path
        for folder in sorted(folders)
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in (".h", ".cc")
    }


SOURCES = sources()


def room_of_source(source: str) -> str:
    """The room whose folder holds a C++ file."""
    owners = [room for room, (_, folders, _) in ROOMS.items() for folder in folders if source.startswith(f"{folder}/")]
    assert len(owners) == 1, f"{source} belongs to {owners or 'no room'}"
    return owners[0]


def includes(path: Path) -> list[str]:
    """Files of ours that a C++ file includes."""
    return [name for name in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE) if name in SOURCES]


def test_sources_include_only_rooms_that_theirs_may() -> None:
    for source, path in SOURCES.items():
        room = room_of_source(source)
        for header in includes(path):
            assert room_of_source(header) in {room, *ROOMS[room][2]}, f"{source} includes {header}"


def test_headers_include_in_no_circle() -> None:
    assert circle({source: includes(path) for source, path in SOURCES.items()}) == []


def test_folders_of_a_room_include_in_no_circle() -> None:
    """For example the FAISS binding includes nothing of the search that is built on it."""
    graph: dict[str, set[str]] = {}
    for source, path in SOURCES.items():
        folder = str(Path(source).parent)
        graph.setdefault(folder, set()).update(str(Path(name).parent) for name in includes(path))
    assert circle({folder: others - {folder} for folder, others in graph.items()}) == []


def test_cores_include_no_tensorflow() -> None:
    """Only adapters know TensorFlow: so a core is tested alone, under sanitizers."""
    adapters = re.compile(r"(_op\.cc|/tf_\w+\.h|_pybind\.cc)$")
    for source, path in SOURCES.items():
        if (
            room_of_source(source) != "serving"
            and not adapters.search(source)
            and source != "export/linked_servable.cc"
        ):
            assert not re.search(r'^#include "tensorflow/', path.read_text(), re.MULTILINE), source
