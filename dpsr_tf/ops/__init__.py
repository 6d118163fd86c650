"""C++ TensorFlow ops of training, and the store reader behind them."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any


def op_library_path() -> str:
    """Absolute path of the training op library. Raises FileNotFoundError if the native parts are not built."""
    path = Path(__file__).parent / "libdpsr_training_ops.so"
    if not path.exists():
        raise FileNotFoundError(f"{path}: the native parts are not built; run `make setup`, or install the wheel")
    return str(path)


@functools.cache
def load() -> Any:
    """The generated Python functions of the training ops; loads the library once a process."""
    import tensorflow as tf

    return tf.load_op_library(op_library_path())


@functools.cache
def load_c() -> ctypes.CDLL:
    """The C functions of the training op library."""
    load()  # brings the TensorFlow library that it needs
    library = ctypes.CDLL(op_library_path())
    library.DpsrDescribeBatchComponents.argtypes = [ctypes.c_char_p]
    library.DpsrDescribeBatchComponents.restype = ctypes.c_char_p
    return library
