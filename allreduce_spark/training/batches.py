"""Shard -> batches: the same number of steps on every rank, every row exactly once an epoch, in an order that can be
worked out again from (seed, epoch, rank)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from allreduce_spark.config import FitConfig
from allreduce_spark.data.shard import Shard
from allreduce_spark.errors import DataError
from allreduce_spark.world import Membership

__all__ = ["BatchPlan", "ShardBatches", "data_sets", "validation_rows_of"]

READ_AHEAD = 2  # batches


@dataclass(frozen=True)
class BatchPlan:
    """How many rows each rank brings to each step. All ranks hold the same plan.

    Ranks with fewer rows run out first; they then take part with 0 rows, because a rank that stayed away would let the
    others wait for ever (horovod#118 and many after it).

    Attributes:
        rows: Rows of each rank, in rank order; at least one rank has some.
        batch_size: Rows per rank per step, at most.

    >>> plan = BatchPlan(rows=(5, 3), batch_size=2)
    >>> plan.steps, [plan.rows_of(1, step) for step in range(plan.steps)]
    (3, [2, 1, 0])
    """

    rows: tuple[int, ...]
    batch_size: int

    @property
    def steps(self) -> int:
        """Steps of one epoch."""
        return -(-max(self.rows) // self.batch_size)

    def rows_of(self, rank: int, step: int) -> int:
        return min(max(self.rows[rank] - step * self.batch_size, 0), self.batch_size)

    def total(self, step: int) -> int:
        """Rows of the global batch."""
        return sum(self.rows_of(rank, step) for rank in range(len(self.rows)))


def validation_rows_of(rows: tuple[int, ...], share: float) -> tuple[int, ...]:
    """How many rows each rank holds out, so that all together hold out what Keras would of all the rows.

    Keras trains on the first `floor(n * (1 - share))` rows (`keras.Model.fit`, validation_split). Rounding on each rank by
    itself would distort the share where shards are small.

    >>> validation_rows_of((3, 3, 3), 0.4)
    (1, 1, 2)
    """
    total = sum(rows)
    held_out = total - int(total * (1 - share))
    # Python's integers: the product of two counts of a billion rows overflows those of numpy.
    ends = [end * held_out // max(total, 1) for end in itertools.accumulate(rows, initial=0)]
    return tuple(end - start for start, end in itertools.pairwise(ends))


def data_sets(
    config: FitConfig, membership: Membership, shards: tuple[Shard, Shard]
) -> tuple[ShardBatches, ShardBatches | None]:
    """The rows to train on, and those to validate on: a set of its own, or the last rows of every shard, or none.

    Args:
        shards: The training rows of this rank, and its rows of a validation set of its own (perhaps empty).
    """
    train_shard, validation_shard = shards
    rank = membership.world.rank
    held_out = validation_rows_of(membership.rows, config.validation_split)
    kept = tuple(rows - held for rows, held in zip(membership.rows, held_out, strict=True))
    seed = config.seed if config.shuffle else None
    train = ShardBatches(train_shard, BatchPlan(kept, config.batch_size), rank, seed=seed)
    batch_size = config.validation_batch_size or config.batch_size
    if any(membership.validation_rows):
        return train, ShardBatches(validation_shard, BatchPlan(membership.validation_rows, batch_size), rank)
    if any(held_out):
        plan = BatchPlan(held_out, batch_size)
        return train, ShardBatches(train_shard, plan, rank, first_row=kept[rank])
    return train, None


class ShardBatches:
    """The batches of one rank's shard: a sequence of (x[, y[, sample_weight]]), and the `tf.data.Dataset` that Keras reads.

    A step to which this rank brings no row still yields a batch of one row (the shard's first, or zeros), because layers are
    not made for empty batches. What is computed from it does not count: `optimizer` weighs it with 0 rows and `callbacks`
    takes back what it did to the metrics.

    Args:
        shard: The rows; y and sample_weight may be missing.
        plan: The same on every rank.
        rank: Which of the plan's ranks this is.
        first_row: Index in the shard of the first row that belongs to this data set; `plan.rows[rank]` rows follow.
        seed: Seed of the order of rows, or None to keep them as they are.

    Attributes:
        epoch: Which order to use; whoever trains moves it on.
        plan, spec: As given, and what a row looks like.
    """

    def __init__(
        self, shard: Shard, plan: BatchPlan, rank: int, *, first_row: int = 0, seed: int | None = None
    ) -> None:
        if shard.spec is None:
            raise DataError("no rank has rows in this data set, so nobody knows what a row looks like")
        self.plan, self.spec, self.epoch = plan, shard.spec, 0
        self._shard, self._rank, self._first_row, self._seed = shard, rank, first_row, seed
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.plan.steps

    def __getitem__(self, step: int) -> tuple[Any, ...]:
        count = self.plan.rows_of(self._rank, step)
        if count == 0:
            return _as_keras_batch(self._shard.take([0]) if len(self._shard) else self.spec.zeros(1))
        rows = np.arange(step * self.plan.batch_size, step * self.plan.batch_size + count)
        if self._seed is not None:
            rows = self._order_of(self.epoch, self._seed)[rows]
        return _as_keras_batch(self._shard.take(rows + self._first_row))

    def dataset(self) -> tf.data.Dataset:
        """The batches in a form that Keras reads ahead, in a thread of its own.

        Not a `keras.utils.PyDataset`: Keras reads that through a Python generator, whose end stalls a process that is busy on
        all its cores for a second now and then, and with it all other ranks (seen between training and validation).
        """
        example = self[0]
        arrays = keras.tree.flatten(example)
        types = [tf.string if array.dtype == object else tf.as_dtype(array.dtype) for array in arrays]

        @tf.autograph.experimental.do_not_convert  # it would leave a file of generated code behind
        def read(step: tf.Tensor) -> Any:
            tensors = tf.numpy_function(lambda number: keras.tree.flatten(self[int(number)]), [step], types)
            for tensor, array in zip(tensors, arrays, strict=True):
                tensor.set_shape((None, *array.shape[1:]))
            return keras.tree.pack_sequence_as(example, tensors)

        options = tf.data.Options()
        options.autotune.enabled = False
        # The all-reduce blocks one of TensorFlow's own threads; reading must not have to wait for it.
        options.threading.private_threadpool_size = 1
        return tf.data.Dataset.range(len(self)).map(read).prefetch(READ_AHEAD).with_options(options)

    def _order_of(self, epoch: int, seed: int) -> np.ndarray:
        """A random order of the rows; 4 bytes a row, the only memory here that grows with the shard."""
        known = self._order  # asked for once: the reader of an epoch that was cut short may still be here
        if known is None or known[0] != epoch:
            count = self.plan.rows[self._rank]
            order = np.arange(count, dtype=np.int32 if count < 2**31 else np.int64)
            np.random.default_rng([seed, epoch, self._rank]).shuffle(order)
            self._order = known = (epoch, order)
        return known[1]


def _as_keras_batch(batch: tuple[Any, Any, Any]) -> tuple[Any, ...]:
    """(x, y, sample_weight) without what is missing at the end, floats as Keras's `fit` casts those of arrays."""
    x, y, sample_weight = (keras.tree.map_structure(_to_floatx, part) for part in batch)
    if sample_weight is not None:
        return x, y, sample_weight
    return (x,) if y is None else (x, y)


def _to_floatx(array: np.ndarray | None) -> Any:
    if array is None:
        return None
    return array.astype(keras.config.floatx(), copy=False) if array.dtype.kind == "f" else array
