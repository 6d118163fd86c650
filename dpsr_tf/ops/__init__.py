"""The C++ TensorFlow ops of training, and the store reader behind them."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any


def op_library_path() -> str:
    """Returns the absolute path of the training op library. Raises FileNotFoundError if it is not built."""
    path = Path(__file__).parent / "libdpsr_training_ops.so"
    if not path.exists():
        raise FileNotFoundError(f"{path}: the native parts are not built; run `make setup`, or install the wheel")
    return str(path)


@functools.cache
def load() -> Any:
    """Loads the op library, once in a process, and returns the generated Python functions of its ops."""
    import tensorflow as tf

    return tf.load_op_library(op_library_path())


@functools.cache
def load_c() -> ctypes.CDLL:
    """Returns the C functions of the training op library."""
    load()  # brings the TensorFlow library that it needs
    library = ctypes.CDLL(op_library_path())
    library.DpsrDescribeBatchComponents.argtypes = [ctypes.c_char_p]
    library.DpsrDescribeBatchComponents.restype = ctypes.c_char_p
    return library
