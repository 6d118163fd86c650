"""Stub for offline builds: the rules that Bazel itself has, under the names that its tools load."""

proto_lang_toolchain = native.proto_lang_toolchain
proto_library = native.proto_library
