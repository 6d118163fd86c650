"""The curl commands of docs/serving.md, as they stand there, on a real servable."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from pathlib import Path

import pytest
from conftest import Job

from dpsr_serving.model_server import start_model_server

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_curl_examples(job: Job) -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL | re.MULTILINE)
    (script,) = [block for block in blocks if "curl -s" in block]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    commands = re.findall(r"^curl .*?(?=^curl |\Z)", script.replace("8501", str(port)), re.DOTALL | re.MULTILINE)
    with start_model_server(job.servable, "shop", arguments=(f"--rest_api_port={port}",)):
        printed = [subprocess.check_output(["bash", "-c", command], text=True, timeout=60) for command in commands]
    states, metadata, plain, search = map(json.loads, printed)
    assert states["model_version_status"][-1]["version"] == "1"
    assert {"serving_default", "search"} <= set(metadata["metadata"]["signature_def"]["signature_def"])
    (best,) = plain["predictions"]
    assert search["outputs"]["item_ids"] == [best["item_ids"][:3]] and best["item_ids"][0] >= 0
