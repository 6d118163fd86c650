"""The proxy: TensorFlow Serving's API on both sides, each request sent on to a server that holds its model."""

from dpsr_serving.proxy.command import main

__all__ = ["main"]
