"""Between numpy and what Spark holds: RDDs, LabeledPoints, DataFrames, vectors and matrices."""

from allreduce_spark.spark.adapters.convert import (
    df_to_simple_rdd,
    encode_label,
    from_data_frame,
    from_labeled_point,
    from_matrix,
    from_vector,
    lp_to_simple_rdd,
    to_data_frame,
    to_labeled_point,
    to_matrix,
    to_simple_rdd,
    to_vector,
)

__all__ = [
    "df_to_simple_rdd",
    "encode_label",
    "from_data_frame",
    "from_labeled_point",
    "from_matrix",
    "from_vector",
    "lp_to_simple_rdd",
    "to_data_frame",
    "to_labeled_point",
    "to_matrix",
    "to_simple_rdd",
    "to_vector",
]
