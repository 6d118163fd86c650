"""How good a retriever is: metrics, baselines, judgments."""
