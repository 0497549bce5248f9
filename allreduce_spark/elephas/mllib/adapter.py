"""Vectors and matrices of MLlib from numpy arrays, and back."""

from allreduce_spark.spark.adapters import from_matrix, from_vector, to_matrix, to_vector

__all__ = ["from_matrix", "from_vector", "to_matrix", "to_vector"]
