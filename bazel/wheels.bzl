"""Repositories for the native parts of wheels in one Python environment.

PYTHON_BIN_PATH names the interpreter of the environment (--repo_env=PYTHON_BIN_PATH=/path/of/python). The default is the
python3 on the PATH.
"""

# find_spec imports nothing. An empty answer means that the package is not installed.
_FIND_PACKAGE = """
import importlib.util, os, sys
spec = importlib.util.find_spec(sys.argv[1])
print(os.path.dirname(spec.origin) if spec and spec.origin else "")
"""

def _package_folder(ctx, package, remedy):
    """Returns the folder of the Python `package`, or fails with `remedy`."""
    python = ctx.os.environ.get("PYTHON_BIN_PATH") or ctx.which("python3")
    if not python:
        fail("@{}: no Python found. Give --repo_env=PYTHON_BIN_PATH=/path/of/python".format(ctx.name))
    result = ctx.execute([python, "-I", "-c", _FIND_PACKAGE, package])
    if result.return_code != 0:
        fail("@{}: {} cannot look for {}: {}".format(ctx.name, python, package, result.stderr))
    folder = result.stdout.strip()
    if not folder:
        fail(("@{}: the Python environment of {} has no {}. {}, or choose another environment with " +
              "--repo_env=PYTHON_BIN_PATH=/path/of/python").format(ctx.name, python, package, remedy))
    return ctx.path(folder)

def _tensorflow_version(ctx):
    """Returns the version that the headers name, such as "2.15.1"."""
    values = {}
    for line in ctx.read("include/tensorflow/core/public/version.h").split("\n"):
        words = [word for word in line.split(" ") if word]
        if len(words) == 3 and words[0] == "#define":
            values[words[1]] = words[2]
    return ".".join([values.get("TF_%s_VERSION" % part, "?") for part in ["MAJOR", "MINOR", "PATCH"]])

def _tensorflow_wheel_impl(ctx):
    remedy = "Install it with `pip install tensorflow==%s`" % ctx.attr.version
    folder = _package_folder(ctx, "tensorflow", remedy)
    for name in ["include", "libtensorflow_framework.so.2", "libtensorflow_cc.so.2"]:
        ctx.symlink(folder.get_child(name), name)
    version = _tensorflow_version(ctx)
    if version != ctx.attr.version:
        fail("@{}: {} is TensorFlow {}, and DPSR's ops are written for {}. {}".format(
            ctx.name,
            folder,
            version,
            ctx.attr.version,
            remedy,
        ))
    ctx.file("BUILD", """\
package(default_visibility = ["//visibility:public"])

# The wheel itself was compiled with these definitions.
cc_library(
    name = "headers",
    hdrs = glob(["include/**"], exclude = ["include/**/*.so"]),
    defines = ["_GLIBCXX_USE_CXX11_ABI=1", "EIGEN_MAX_ALIGN_BYTES=64", "NDEBUG"],
    includes = ["include"],
)

cc_import(name = "framework_library", shared_library = "libtensorflow_framework.so.2")

cc_import(name = "cc_library", shared_library = "libtensorflow_cc.so.2")

# For op libraries. The process that loads one has the rest of TensorFlow.
cc_library(name = "framework", deps = [":headers", ":framework_library"])

# For programs: all of TensorFlow, with its C API.
cc_library(name = "tensorflow", deps = [":cc_library", ":framework"])
""")

tensorflow_wheel = repository_rule(
    implementation = _tensorflow_wheel_impl,
    attrs = {"version": attr.string(mandatory = True, doc = "the only TensorFlow version that is accepted")},
    environ = ["PYTHON_BIN_PATH"],
    local = True,
    doc = "Defines the TensorFlow of a Python environment: @name//:framework for ops, @name//:tensorflow for programs.",
)

def _faiss_wheel_impl(ctx):
    folder = _package_folder(ctx, "faiss", "Install it with `pip install faiss-cpu==1.15.1`")
    ctx.symlink(folder.get_child("libfaiss.so"), "faiss/libfaiss.so")

    # The run path of libfaiss.so is relative to its own folder, so its neighbours must keep their places.
    for neighbour in folder.dirname.readdir():
        if neighbour.basename in ["faiss_cpu.libs", "faiss_gpu.libs"]:
            ctx.symlink(neighbour, neighbour.basename)
    ctx.file("BUILD", """\
package(default_visibility = ["//visibility:public"])

exports_files(["faiss/libfaiss.so"])

filegroup(name = "libraries", srcs = ["faiss/libfaiss.so"] + glob(["faiss_*.libs/**"]))
""")

faiss_wheel = repository_rule(
    implementation = _faiss_wheel_impl,
    environ = ["PYTHON_BIN_PATH"],
    local = True,
    doc = "Defines the FAISS library of a Python environment. Tests load it at run time; nothing links it.",
)
