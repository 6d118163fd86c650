"""Item embeddings, the FAISS index over them, and the servable that fuses it with the query tower."""

from __future__ import annotations

from pathlib import Path


def op_library_path() -> str:
    """Absolute path of the retrieval op library. Raises FileNotFoundError if the native parts are not built."""
    path = Path(__file__).parent / "libdpsr_retrieval_ops.so"
    if not path.exists():
        raise FileNotFoundError(f"{path}: the native parts are not built; run `make setup`, or install the wheel")
    return str(path)
