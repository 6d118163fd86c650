"""Runs a notebook without Jupyter.

`python tests/end_to_end/notebooks.py docs/tutorial.ipynb` writes what the cells of the tutorial print into it.

Cells are Python. A line that begins with `!` is a command of the shell, as in Jupyter; a failing one ends the run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_PREPARE = """
import subprocess as _subprocess, sys as _sys
def _shell(command):
    done = _subprocess.run(["bash", "-c", command], stdout=_subprocess.PIPE, text=True)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        _sys.exit(f"`{command}` ended with status {done.returncode}")
"""


def run_notebook(path: Path, folder: Path, timeout_s: float = 500) -> list[str]:
    """Runs all code cells in one process in `folder`, and returns what each printed on standard output.

    Raises RuntimeError with all output if a cell or a command fails.
    """
    cells = [cell["source"] for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    script = _PREPARE
    for cell in cells:
        script += "print('\\x1e', end='', flush=True)\n"
        for line in "".join(cell).splitlines():
            script += f"_shell({line[1:]!r})\n" if line.startswith("!") else f"{line}\n"
    (folder / "notebook.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "notebook.py"],
        cwd=folder,
        env={**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    if done.returncode:
        raise RuntimeError(f"{path.name} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout.split("\x1e")[1:]


def fill(path: Path, printed: list[str]) -> None:
    """Writes what the code cells printed into the notebook."""
    notebook: dict[str, Any] = json.loads(path.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, (cell, text) in enumerate(zip(code, printed, strict=True), 1):
        cell["execution_count"] = number
        lines = text.splitlines(keepends=True)
        cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
    path.write_text(json.dumps(notebook, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        fill(Path(sys.argv[1]), run_notebook(Path(sys.argv[1]), Path(temporary)))
