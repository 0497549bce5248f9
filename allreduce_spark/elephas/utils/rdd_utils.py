"""Between numpy and RDDs, with Elephas's word `nb_classes`."""

from __future__ import annotations

from typing import Any

import numpy as np
from pyspark import RDD
from pyspark.mllib.regression import LabeledPoint

from allreduce_spark.elephas.mllib.adapter import from_vector, to_vector
from allreduce_spark.spark import adapters
from allreduce_spark.spark.adapters import to_labeled_point, to_simple_rdd

__all__ = [
    "encode_label",
    "from_labeled_point",
    "from_vector",
    "lp_to_simple_rdd",
    "to_labeled_point",
    "to_simple_rdd",
    "to_vector",
]


def from_labeled_point(
    rdd: RDD[LabeledPoint], categorical: bool = False, nb_classes: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`allreduce_spark.spark.adapters.from_labeled_point`."""
    return adapters.from_labeled_point(rdd, categorical, nb_classes or None)


def encode_label(label: Any, nb_classes: int) -> np.ndarray:
    """`allreduce_spark.spark.adapters.encode_label`."""
    return adapters.encode_label(label, nb_classes)


def lp_to_simple_rdd(
    lp_rdd: RDD[LabeledPoint], categorical: bool = False, nb_classes: int | None = None
) -> RDD[tuple[np.ndarray, Any]]:
    """`allreduce_spark.spark.adapters.lp_to_simple_rdd`."""
    return adapters.lp_to_simple_rdd(lp_rdd, categorical, nb_classes or None)
