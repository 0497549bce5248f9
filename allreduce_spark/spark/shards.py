"""RDD | DataFrame | arrays -> blocks: whatever the user has, as bytes, in one partition per rank or in its own order.

`shards_of` is for training: every rank's rows in the partition with its number. `blocks_of` is for inference: the blocks
stay in the partitions they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import pyarrow as pa
from pyspark import RDD, SparkContext, TaskContext
from pyspark.ml.linalg import VectorUDT
from pyspark.sql import Column, DataFrame, functions
from pyspark.sql.pandas.types import to_arrow_schema
from pyspark.sql.types import BooleanType, NumericType, StructField, StructType
from pyspark.sql.utils import is_remote

from allreduce_spark.data.arrays import arrays_to_blocks
from allreduce_spark.data.cells import canonical_vectors
from allreduce_spark.data.columns import check_columns
from allreduce_spark.data.flat import is_vector
from allreduce_spark.data.forms import TableForm
from allreduce_spark.data.rows import rows_to_blocks
from allreduce_spark.data.tables import table_to_blocks
from allreduce_spark.errors import ConfigError, DataError

__all__ = [
    "Columns",
    "FormedTable",
    "blocks_of",
    "blocks_of_table",
    "check_is_frame",
    "check_is_rows",
    "column_of",
    "columns_of",
    "map_batches",
    "scalar_columns",
    "select_columns",
    "shards_for",
    "shards_of",
]

# So much of the driver's arrays goes to each rank in one task; more takes the way of an RDD, through a shuffle. A task that is
# sent to an executor must not be larger than spark.rpc.message.maxSize, 128 MiB.
DIRECT_BYTES_PER_RANK = 64 << 20
BLOCKS_PER_SLICE = 8


@dataclass(frozen=True)
class Columns:
    """Which columns of a DataFrame are what.

    Attributes:
        features: One column is x itself; several are a dict of inputs.
        label: Likewise y; empty where there is none.
        weight: Sample weights, or None.
    """

    features: tuple[str, ...] = ("features",)
    label: tuple[str, ...] = ("label",)
    weight: str | None = None

    @property
    def form(self) -> TableForm:
        return TableForm.of_columns(self.features, self.label, self.weight)


@dataclass(frozen=True)
class FormedTable:
    """A DataFrame of which more is known than the names of its columns: the way of the Spark ML estimator.

    Attributes:
        frame: The rows.
        form: What to make of their columns.
    """

    frame: DataFrame
    form: TableForm


def columns_of(features: str | Sequence[str], label: str | Sequence[str], weight: str | None) -> Columns:
    """The columns that the arguments `features_col`, `label_col` and `weight_col` of a fit name.

    Raises:
        ConfigError: They are no names.
    """

    def names(argument: str, value: Any) -> tuple[str, ...]:
        columns = (value,) if isinstance(value, str) else value
        if not isinstance(columns, (list, tuple)) or not all(isinstance(name, str) for name in columns):
            raise ConfigError(f"{argument} must be a column name or a list of them, got {value!r}.")
        return tuple(columns)

    if not (weight is None or isinstance(weight, str)):
        raise ConfigError(f"weight_col must be a column name or None, got {weight!r}.")
    return Columns(names("features_col", features), names("label_col", label), weight)


def shards_of(
    context: SparkContext, data: Any, validation: Any, columns: Columns, num_ranks: int
) -> RDD[tuple[int, bytes]]:
    """The rows as pairs (number of the shard, block), every shard in the partition with its number.

    Args:
        data: An RDD of (x, y[, sample_weight]), a DataFrame, or arrays (x, y[, sample_weight]).
        validation: Likewise, or None; its blocks travel along with the role "validation".
        columns: For DataFrames.

    Raises:
        DataError: Arrays or columns that can be seen here to be unfit. What is wrong with single rows of an RDD or a
            DataFrame shows when the stage reads them.
    """
    pairs = {"train": _pairs(data, "train", columns, num_ranks)}
    if validation is not None:
        try:
            pairs["validation"] = _pairs(validation, "validation", columns, num_ranks)
        except DataError as error:
            raise DataError(f"validation_data: {error}") from error
    on_driver = [part for part in pairs.values() if isinstance(part, list)]
    if len(on_driver) == len(pairs):
        per_rank = _by_shard([pair for part in on_driver for pair in part], num_ranks)
        if max(sum(map(len, blocks)) for blocks in per_rank) <= DIRECT_BYTES_PER_RANK:
            return _one_slice_per_rank(context, per_rank)
    rdds = [
        part if isinstance(part, RDD) else context.parallelize(part, -(-len(part) // BLOCKS_PER_SLICE))
        for part in pairs.values()
    ]
    return context.union(rdds).partitionBy(num_ranks, partial(_rank_of, num_ranks=num_ranks))


def shards_for(shards: RDD[tuple[int, bytes]], num_shards: int, num_ranks: int) -> RDD[tuple[int, bytes]]:
    """The same pairs in one partition per rank: rank r of fewer than there are shards has shards r, r + num_ranks, ..."""
    if num_ranks == num_shards:
        return shards
    return shards.partitionBy(num_ranks, partial(_rank_of, num_ranks=num_ranks))


def blocks_of(context: SparkContext, data: Any, columns: Columns, num_slices: int) -> RDD[bytes]:
    """The rows as blocks for inference, partition by partition in the order of the data.

    Args:
        num_slices: Into how many partitions arrays are cut.
    """
    pairs = _pairs(data, "train", columns, 1)
    if isinstance(pairs, list):
        slices = max(num_slices, -(-len(pairs) // BLOCKS_PER_SLICE))
        return context.parallelize([block for _, block in pairs], min(slices, len(pairs)))
    return pairs.values()


def _pairs(data: Any, role: str, columns: Columns, num_shards: int) -> list[tuple[int, bytes]] | RDD[tuple[int, bytes]]:
    """(number of the shard, block): a list where the data is on the driver, an RDD where it is not."""
    if isinstance(data, RDD):
        return data.mapPartitionsWithIndex(partial(_blocks_of_rows, role=role, num_shards=num_shards))
    if isinstance(data, DataFrame):
        data = FormedTable(data, columns.form)
    if isinstance(data, FormedTable):
        return blocks_of_table(data, role, num_shards).rdd.map(_pair)
    return list(arrays_to_blocks(*check_is_rows(data), role=role, num_shards=num_shards))


def check_is_rows(data: Any) -> Sequence[Any]:
    """Return arrays (x[, y[, sample_weight]]), or say what may be given instead of what was.

    Raises:
        DataError: It is something else.
    """
    if isinstance(data, (tuple, list)) and len(data) in (1, 2, 3):
        return data
    rdd = "" if is_remote() else "an RDD of such pairs for single rows, "
    raise DataError(
        f"the data is of type {_type_name(data)}; expected arrays (x, y) or (x, y, sample_weight), {rdd}or a Spark DataFrame. "
        f"{_way_to_spark(data)}"
    )


def check_is_frame(data: Any) -> None:
    """Make sure that data for Spark ML is a Spark DataFrame.

    Raises:
        DataError: It is something else; says how to make one of it.
    """
    if not isinstance(data, DataFrame):
        raise DataError(f"the data is of type {_type_name(data)}; expected a Spark DataFrame. {_way_to_spark(data)}")


def _type_name(data: Any) -> str:
    name = f"{type(data).__module__}.{type(data).__qualname__}".removeprefix("builtins.")
    return f"{name} of length {len(data)}" if isinstance(data, (tuple, list)) else name


def _way_to_spark(data: Any) -> str:
    module = type(data).__module__
    if module.startswith("pandas"):
        return "Make a Spark DataFrame of it with spark.createDataFrame(data)."
    if module.startswith(("tensorflow", "keras", "torch", "jax")):
        return "A data set that is made for one process cannot be divided among ranks: give the rows themselves."
    if isinstance(data, list) and is_remote():
        return "Make arrays of a list of rows, or a Spark DataFrame with spark.createDataFrame(rows, ['features', 'label'])."
    if isinstance(data, list):
        return "Make an RDD of a list of rows with spark.sparkContext.parallelize(rows)."
    if isinstance(data, str):
        return "Read a file with spark.read first."
    return ""


def _blocks_of_rows(partition: int, rows: Iterable[Any], *, role: str, num_shards: int) -> Iterator[tuple[int, bytes]]:
    return rows_to_blocks(rows, partition=partition, role=role, num_shards=num_shards)


def blocks_of_table(table: FormedTable, role: str, num_shards: int) -> DataFrame:
    """(shard int, block binary), every partition by itself, dealt out as `data.blocks.BlockDealer` says.

    Raises:
        DataError: A column is missing, or of a type that cannot be made into what is asked for.
    """
    selected = select_columns(table.frame, table.form)
    task = partial(_blocks_of_batches, form=table.form, role=role, num_shards=num_shards)
    return map_batches(selected, task, "shard int, block binary")


def select_columns(frame: DataFrame, form: TableForm) -> DataFrame:
    """The columns that are needed.

    Raises:
        DataError: One is missing, or of a type that cannot be made into what is asked for.
    """
    missing = next((name for name in form.columns if name not in frame.columns), None)
    if missing is not None:
        raise DataError(f"the DataFrame has no column {missing!r}; its columns are {frame.columns}")
    selected = frame.select([column_of(frame, name) for name in form.columns])
    check_columns(to_arrow_schema(selected.schema), form)
    return selected


def column_of(frame: DataFrame, name: str) -> Column:
    """A column by its whole name: quoted, because a dot in it would mean a part of a struct."""
    return frame[f"`{name.replace('`', '``')}`"]


def scalar_columns(frame: DataFrame) -> frozenset[str]:
    """The columns that hold plain numbers, and no arrays of them."""
    return frozenset(
        field.name for field in frame.schema.fields if isinstance(field.dataType, (NumericType, BooleanType))
    )


def map_batches(
    frame: DataFrame,
    task: Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]],
    schema: StructType | str,
    **named: Any,
) -> DataFrame:
    """`mapInArrow` for columns of any name, and for many vectors.

    PySpark's own takes a dot in a name for a part of a struct. And Spark 4 measures its Arrow buffers after every row; the
    indices of a dense vector are null, and a list of nulls is filled anew from its start each time, which takes four
    times as long as all the rest. So vectors leave the JVM with empty lists there, and come back as they were.
    """
    names = frame.columns
    if any("." in name or "`" in name for name in names):
        frame = frame.toDF(*(f"column{index}" for index in range(len(names))))
        task = partial(_with_names, task, names)
    if any(isinstance(field.dataType, VectorUDT) for field in frame.schema.fields):
        frame = frame.select([_without_null_indices(frame, field) for field in frame.schema.fields])
        task = partial(_with_null_indices, task)
    return frame.mapInArrow(task, schema, **named)


def _with_names(
    task: Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]],
    names: list[str],
    batches: Iterator[pa.RecordBatch],
) -> Iterator[pa.RecordBatch]:
    return task(batch.rename_columns(names) for batch in batches)


def _without_null_indices(frame: DataFrame, field: StructField) -> Column:
    column = column_of(frame, field.name)
    if not isinstance(field.dataType, VectorUDT):
        return column
    vector = functions.unwrap_udt(column)
    none = functions.array().cast("array<int>")
    return vector.withField("indices", functions.coalesce(vector["indices"], none)).alias(field.name)


def _with_null_indices(
    task: Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]], batches: Iterator[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    for batch in task(batches):
        columns = [canonical_vectors(column) if is_vector(column.type) else column for column in batch.columns]
        yield pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _blocks_of_batches(
    batches: Iterable[pa.RecordBatch], *, form: TableForm, role: str, num_shards: int
) -> Iterator[pa.RecordBatch]:
    context = TaskContext.get()
    assert context is not None
    pairs = table_to_blocks(batches, form, partition=context.partitionId(), role=role, num_shards=num_shards)
    for shard, block in pairs:
        yield pa.RecordBatch.from_pydict(
            {"shard": pa.array([shard], pa.int32()), "block": pa.array([block], pa.binary())}
        )


def _pair(row: Any) -> tuple[int, bytes]:
    return row[0], bytes(row[1])


def _rank_of(shard: int, *, num_ranks: int) -> int:
    return shard % num_ranks


def _by_shard(pairs: Sequence[tuple[int, bytes]], num_ranks: int) -> list[list[bytes]]:
    shards: list[list[bytes]] = [[] for _ in range(num_ranks)]
    for shard, block in pairs:
        shards[shard].append(block)
    return shards


def _one_slice_per_rank(context: SparkContext, shards: list[list[bytes]]) -> RDD[tuple[int, bytes]]:
    """Without a shuffle: Spark cuts a list into equal slices, so equally many blocks per rank, some empty, are one slice."""
    columns = list(zip_longest(*shards, fillvalue=b"")) or [(b"",) * len(shards)]
    pairs = [(number, block) for number, shard in enumerate(zip(*columns, strict=True)) for block in shard]
    return context.parallelize(pairs, len(shards)).filter(_has_block)


def _has_block(pair: tuple[int, bytes]) -> bool:
    return bool(pair[1])
