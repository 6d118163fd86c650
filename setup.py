"""Builds the wheel and the editable install. CMake builds the native parts (see CMakeLists.txt)."""

import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# Import name of each Python package -> the folder that holds the package. Import names are folder names.
PACKAGE_ROOTS = {
    "dpsr_common": "common",
    "dpsr_tokenizer": "tokenizer_cc",
    "dpsr_tf": ".",
    "dpsr_export": "export",
    "dpsr_serving": "serving",
}


class CMakeBuild(build_ext):
    """Runs CMake and Ninja. An in-place build puts its outputs into the source tree, any other below `build_lib`."""

    def run(self) -> None:
        """Builds every native part in one CMake project, whatever the number of extensions."""
        wheels = [importlib.util.find_spec(name) for name in ("tensorflow", "tensorflow_serving", "pybind11")]
        if None in wheels:
            raise SystemExit(
                "setup.py: the native parts need tensorflow, tensorflow-serving-api and pybind11 in this environment; "
                "run `make setup`, or build with pip, which fetches them"
            )
        # Each Python environment has a build folder of its own: the compile flags hold the path of its TensorFlow, and
        # a build in pip's isolated environment must not replace the object files of the developer's environment.
        environment = "\n".join([sys.executable] + [str(spec.origin) for spec in wheels if spec is not None])
        build = ROOT / "build" / f"cmake-{hashlib.sha256(environment.encode()).hexdigest()[:8]}"
        if not (build / "build.ninja").exists():
            self._call("cmake", "-S", ROOT, "-B", build, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}")
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
        self._call("cmake", "--build", build, "--parallel", jobs)
        if self.inplace:
            # `make test` finds the C++ tests of this environment through this link.
            current = ROOT / "build" / "current"
            current.unlink(missing_ok=True)
            current.symlink_to(build.name)
        else:
            self._call("cmake", "--install", build, "--prefix", Path(self.build_lib).resolve(), "--strip")

    @staticmethod
    def _call(*command: object) -> None:
        subprocess.run([str(part) for part in command], check=True)


setup(
    packages=[
        package for name, root in PACKAGE_ROOTS.items() for package in find_packages(root, include=[name, f"{name}.*"])
    ],
    package_dir={name: os.path.normpath(f"{root}/{name}") for name, root in PACKAGE_ROOTS.items()},
    # MANIFEST.in is for the source distribution; the wheel has no C++ sources.
    include_package_data=False,
    package_data={
        "": ["py.typed", "*.pyi", "*.yaml"],
        "dpsr_serving": ["*.proto"],
        "dpsr_serving.gateway": ["*.proto", "page/*"],
        "dpsr_tf": ["configs/*.yaml"],
        "dpsr_tf.data": ["adapters/*.yaml"],
    },
    ext_modules=[
        Extension(f"{package}._native", sources=[])
        for package in ("dpsr_common", "dpsr_tokenizer", "dpsr_tf.ops", "dpsr_serving")
    ],
    cmdclass={"build_ext": CMakeBuild},
)
