"""Evaluation of retrievers: judgments, metrics, baselines, fusion, and `dpsr evaluate`."""
