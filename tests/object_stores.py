"""An object store for tests: moto's S3 server, in this process, and what the clients of AWS must know of it."""

from __future__ import annotations

import contextlib
import logging
import urllib.request
from collections.abc import Iterator

import pytest
from moto.server import ThreadedMotoServer

BUCKET = "s3://shop"


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Runs a server with an empty bucket, BUCKET, for this process and its children. Yields its address."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", address)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        bucket = urllib.request.Request(f"{address}/{BUCKET.removeprefix('s3://')}", method="PUT")
        urllib.request.urlopen(bucket).close()
        try:
            yield address
        finally:
            server.stop()
