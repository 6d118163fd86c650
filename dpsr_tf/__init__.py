"""DPSR: deep personalized and semantic retrieval (SIGIR 2020). Importing this package imports nothing heavy."""

__version__ = "0.2.0"
