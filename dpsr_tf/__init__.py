"""DPSR: deep personalized and semantic retrieval (SIGIR 2020). Importing this package imports nothing heavy."""

from dpsr_common import __version__

__all__ = ["__version__"]
