"""Raw logs into the three-file store, and the store into training batches."""
