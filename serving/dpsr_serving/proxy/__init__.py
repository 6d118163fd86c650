"""The proxy: TensorFlow Serving's API on both sides, each request sent on to a server that holds its model."""
