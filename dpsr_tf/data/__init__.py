"""From raw logs to the store, and from the store to training batches and requests."""
