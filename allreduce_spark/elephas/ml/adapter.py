"""Between numpy, RDDs and DataFrames, with Elephas's word `nb_classes`."""

from __future__ import annotations

from typing import Any

import numpy as np
from pyspark import RDD
from pyspark.sql import DataFrame

from allreduce_spark.elephas.utils.rdd_utils import from_labeled_point, lp_to_simple_rdd, to_labeled_point
from allreduce_spark.spark import adapters
from allreduce_spark.spark.adapters import to_data_frame

__all__ = [
    "df_to_simple_rdd",
    "from_data_frame",
    "from_labeled_point",
    "lp_to_simple_rdd",
    "to_data_frame",
    "to_labeled_point",
]


def from_data_frame(
    df: DataFrame, categorical: bool = False, nb_classes: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`allreduce_spark.spark.adapters.from_data_frame`."""
    return adapters.from_data_frame(df, categorical, nb_classes or None)


def df_to_simple_rdd(
    df: DataFrame,
    categorical: bool = False,
    nb_classes: int | None = None,
    features_col: str = "features",
    label_col: str = "label",
) -> RDD[tuple[Any, Any]]:
    """`allreduce_spark.spark.adapters.df_to_simple_rdd`."""
    return adapters.df_to_simple_rdd(df, categorical, nb_classes or None, features_col, label_col)
