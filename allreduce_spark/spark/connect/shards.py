"""DataFrame | arrays -> blocks in a DataFrame of the Connect session; ranks then get them by the number of their shard."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession

from allreduce_spark.data.arrays import arrays_to_blocks
from allreduce_spark.errors import DataError
from allreduce_spark.spark.shards import Columns, FormedTable, blocks_of_table, check_is_rows

__all__ = ["frame_of_blocks", "shards_of"]


def shards_of(session: SparkSession, data: Any, validation: Any, columns: Columns, num_shards: int) -> DataFrame:
    """The rows as (shard int, block binary), in any partitions: `spark.shards.shards_of` for a Connect session.

    Raises:
        DataError: Arrays or columns that can be seen here to be unfit.
    """
    shards = _shards(session, data, "train", columns, num_shards)
    if validation is None:
        return shards
    try:
        return shards.union(_shards(session, validation, "validation", columns, num_shards))
    except DataError as error:
        raise DataError(f"validation_data: {error}") from error


def frame_of_blocks(session: SparkSession, blocks: Iterable[tuple[int, bytes]]) -> DataFrame:
    """Blocks of this process as rows of the session, in their order."""
    pairs = list(blocks)
    return session.createDataFrame(
        pa.table(
            {
                "shard": pa.array([shard for shard, _ in pairs], pa.int32()),
                "block": pa.chunked_array([pa.array([block], pa.binary()) for _, block in pairs], pa.binary()),
            }
        )
    )


def _shards(session: SparkSession, data: Any, role: str, columns: Columns, num_shards: int) -> DataFrame:
    if isinstance(data, DataFrame):
        data = FormedTable(data, columns.form)
    if isinstance(data, FormedTable):
        return blocks_of_table(data, role, num_shards)
    return frame_of_blocks(session, arrays_to_blocks(*check_is_rows(data), role=role, num_shards=num_shards))
