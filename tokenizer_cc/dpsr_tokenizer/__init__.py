"""The tokenizer and vocabulary of DPSR: one C++ core for data preparation, training and serving.

Needs NumPy only. The TensorFlow op over the same core is in `dpsr_tokenizer.tf_ops`.

>>> Tokenizer().tokenize("iPhone 手机壳")[:3]
['iphone', '##ip', '#iph']
"""

from __future__ import annotations

from pathlib import Path

from dpsr_common.packed_file import FormatError
from dpsr_tokenizer._native import Tokenizer, TokenizerConfig, Vocabulary, VocabularyBuilder

__all__ = ["FormatError", "Tokenizer", "TokenizerConfig", "Vocabulary", "VocabularyBuilder", "op_library_path"]


def op_library_path() -> str:
    """Absolute path of the TensorFlow op library, for `tf.load_op_library` and for a model server's list of libraries.

    Raises FileNotFoundError when it is not built.
    """
    path = Path(__file__).resolve().parent / "libdpsr_tokenizer_ops.so"
    if not path.exists():
        raise FileNotFoundError(f"{path}: the op library is not built; run `make setup`, or install dpsr from a wheel")
    return str(path)
