"""The tokenizer and vocabulary of DPSR, with one C++ core for data preparation, training and serving.

This module needs NumPy only. `dpsr_tokenizer.tf_ops` has TensorFlow ops with the same core.

>>> Tokenizer().tokenize("iPhone 手机壳")[:3]
['iphone', '##ip', '#iph']
"""

from __future__ import annotations

from pathlib import Path

from dpsr_common.packed_file import FormatError
from dpsr_tokenizer._native import Tokenizer, TokenizerConfig, Vocabulary, VocabularyBuilder, WordSequences

__all__ = [
    "FormatError",
    "Tokenizer",
    "TokenizerConfig",
    "Vocabulary",
    "VocabularyBuilder",
    "WordSequences",
    "op_library_path",
]


def op_library_path() -> str:
    """Returns the absolute path of the TensorFlow op library, for `tf.load_op_library` and for model servers.

    Raises FileNotFoundError if the library is not built.
    """
    path = Path(__file__).resolve().parent / "libdpsr_tokenizer_ops.so"
    if not path.exists():
        raise FileNotFoundError(f"{path}: the op library is not built; run `make setup`, or install dpsr from a wheel")
    return str(path)
