"""Serving: starts the model server, runs the proxy, places models on servers, and has the clients.

Nothing here imports TensorFlow.
"""
