"""The Estimator pipeline: store and config into checkpoints."""
