"""JDsearch with the candidate lists of four fifths of the users for training, which a ranker needs; see jdsearch.py."""

from dpsr_tf.data.adapters.jdsearch import convert

__all__ = ["convert"]
