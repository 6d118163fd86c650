"""Serving: the launcher of the model server, the proxy, the client. Nothing here imports TensorFlow."""
