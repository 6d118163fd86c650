"""The wheel that is built from this checkout works in an environment without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), "."]
    subprocess.run(command, cwd=ROOT, check=True, timeout=900)
    return next(out.glob("dpsr-*.whl"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with the wheel and, by links, the other packages of this one: the same TensorFlow."""
    venv = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    packages = Path(sysconfig.get_paths(vars={"base": str(venv), "platbase": str(venv)})["purelib"])
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "dpsr" not in entry.name:
            (packages / entry.name).symlink_to(entry)
    command = [sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python"), "install", "-q", "--no-deps"]
    subprocess.run([*command, str(wheel)], check=True, timeout=300)
    return venv


def test_wheel_holds_the_native_parts(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for part in (
        "dpsr_common/_native.",
        "dpsr_common/serving_apis.desc",
        "dpsr_tokenizer/_native.",
        "dpsr_tokenizer/libdpsr_tokenizer_ops.so",
        "dpsr_tf/ops/_native.",
        "dpsr_tf/ops/libdpsr_training_ops.so",
        "dpsr_tf/configs/homedepot.yaml",
        "dpsr_tf/data/adapters/homedepot.yaml",
        "dpsr_tf/shop/lexicon.yaml",
        "dpsr_export/libdpsr_retrieval_ops.so",
        "dpsr_serving/_native.",
        "dpsr_serving/libnghttp2.so.14",
        "dpsr_serving/libnghttp2.copyright",
        "dpsr_serving/libjemalloc.so.2",
        "dpsr_serving/libjemalloc.copyright",
        "dpsr_serving/bin/dpsr_model_server",
        "dpsr_tokenizer/py.typed",
    ):
        assert any(name.startswith(part) for name in names), part
    assert not [name for name in names if name.startswith("tests") or name.endswith((".cc", ".h"))]
    notices = [name for name in names if ".dist-info/licenses/" in name]
    assert sorted(name.rpartition("/")[2] for name in notices) == ["LICENSE", "THIRD_PARTY_NOTICES.txt"]


def test_native_parts_name_no_path_of_this_machine(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    binaries = [*tmp_path.rglob("*.so"), tmp_path / "dpsr_serving" / "bin" / "dpsr_model_server"]
    assert len(binaries) == 8
    for binary in binaries:
        dynamic = subprocess.run(["readelf", "-d", str(binary)], capture_output=True, text=True, check=True).stdout
        for line in dynamic.splitlines():
            if "RUNPATH" in line or "RPATH" in line:
                assert "[$ORIGIN" in line and str(ROOT) not in line, (binary, line)
        # Our C++ cores are linked statically; only libraries of TensorFlow and of the system are needed, and nghttp2
        # and jemalloc, which lie in the package of the module and the server.
        needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "NEEDED" in line}
        system = ("libc.so", "libm.so", "libstdc++", "libgcc_s", "ld-linux", "libdl", "libpthread", "libz.so", "librt")
        bundled = ("libnghttp2.so.14", "libjemalloc.so.2") if "dpsr_serving" in binary.parts else ()
        assert not [n for n in needed if not n.startswith((*system, *bundled, "libtensorflow"))], (binary, needed)


@pytest.mark.long
def test_the_whole_path_runs_from_the_wheel(environment: Path, tmp_path: Path) -> None:
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL", "FAISS", "LD_"))
    }
    result = subprocess.run(
        [str(environment / "bin" / "dpsr"), "demo", "--out=demo", "--steps=100"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**clean, "PATH": "/usr/bin:/bin"},
        timeout=500,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "server:127.0.0.1" in result.stdout and "The servable lies in demo/servable" in result.stdout


def test_base_install_queries_without_tensorflow(environment: Path) -> None:
    """The developers of a search backend run `dpsr query`, so it must not need the training packages."""
    script = (
        "import sys; sys.modules['tensorflow'] = sys.modules['pyarrow'] = None\n"
        "from dpsr_common.command_line import main\n"
        "sys.exit(main(['query', '--target=127.0.0.1:9', '--timeout_s=1', 'shoes']))"
    )
    result = subprocess.run(
        [str(environment / "bin" / "python"), "-c", script], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1 and "127.0.0.1:9" in result.stderr, result.stderr
