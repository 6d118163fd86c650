"""The external repositories of DPSR. All are found on this machine; nothing is downloaded.

A workspace that depends on DPSR calls dpsr_repositories() too. It may define some of these repositories before that:
TensorFlow Serving, for example, would make @tensorflow_wheel//:framework an alias of its own TensorFlow.
"""

load("//bazel:system.bzl", "system_repository")
load("//bazel:wheels.bzl", "faiss_wheel", "tensorflow_wheel")

def dpsr_repositories():
    """Defines each external repository of DPSR that the workspace has not defined yet."""
    defined = native.existing_rules()
    if "tensorflow_wheel" not in defined:
        tensorflow_wheel(name = "tensorflow_wheel", version = "2.15.1")
    if "faiss_wheel" not in defined:
        faiss_wheel(name = "faiss_wheel")
    if "utf8proc" not in defined:
        system_repository(
            name = "utf8proc",
            archives = ["libutf8proc.a"],
            debian_package = "libutf8proc-dev",
            headers = ["utf8proc.h"],
        )
    if "xxhash" not in defined:
        system_repository(
            name = "xxhash",
            debian_package = "libxxhash-dev",
            headers = ["xxhash.h"],
        )
    if "nghttp2" not in defined:
        # Its library is linked by name, because Debian's archive is not position-independent.
        system_repository(
            name = "nghttp2",
            debian_package = "libnghttp2-dev",
            headers = ["nghttp2"],
        )
    if "rapidjson" not in defined:
        system_repository(
            name = "rapidjson",
            debian_package = "rapidjson-dev",
            headers = ["rapidjson"],
        )
    if "googletest" not in defined:
        system_repository(
            name = "googletest",
            archives = ["libgtest_main.a", "libgtest.a"],
            debian_package = "libgtest-dev",
            headers = ["gtest"],
        )
