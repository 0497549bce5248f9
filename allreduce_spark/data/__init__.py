"""Rows on their way to a rank: columnar Arrow blocks, and the shard that one rank reads. No Spark, no Keras.

rows, arrays, tables    what a user gives  -> (shard, block) pairs, in a Spark map task or on the driver
forms, flat, columns    what the columns of a table must be, and reading them so
cells                   the way back: arrays -> columns
blocks                  a block <-> bytes, and dealing rows out to the shards
spool                   blocks -> the file of one shard, in the agent
shard                   the mapped file -> the rows of a batch, in the rank process
spec, values            what a row looks like, and what may be in it
"""

from allreduce_spark.data.arrays import arrays_to_blocks
from allreduce_spark.data.blocks import Block, ErrorBlock, decode_block
from allreduce_spark.data.columns import check_columns
from allreduce_spark.data.forms import ArrayForm, TableForm
from allreduce_spark.data.rows import rows_to_blocks
from allreduce_spark.data.shard import Shard
from allreduce_spark.data.spec import RowSpec, common_spec, difference
from allreduce_spark.data.spool import ShardWriter
from allreduce_spark.data.tables import table_to_blocks

__all__ = [
    "ArrayForm",
    "Block",
    "ErrorBlock",
    "RowSpec",
    "Shard",
    "ShardWriter",
    "TableForm",
    "arrays_to_blocks",
    "check_columns",
    "common_spec",
    "decode_block",
    "difference",
    "rows_to_blocks",
    "table_to_blocks",
]
