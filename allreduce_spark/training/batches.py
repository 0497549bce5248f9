"""Shards -> batches: the same number of steps on every rank, every row exactly once an epoch, in an order that can be
worked out again from (seed, epoch, shard)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from allreduce_spark.config import FitConfig
from allreduce_spark.data.shard import Shard
from allreduce_spark.errors import DataError
from allreduce_spark.training.backends import ours
from allreduce_spark.world import Membership

__all__ = ["BatchPlan", "ShardBatches", "data_sets", "validation_rows_of"]


@dataclass(frozen=True)
class BatchPlan:
    """How many rows each shard brings to each step. All ranks hold the same plan.

    A fit keeps its shards for its whole life, however many ranks there are to train them: so the rows of a global batch are the
    same for any number of ranks. Shards with fewer rows run out first; their ranks then take part with fewer, or 0, because a
    rank that stayed away would let the others wait for ever (horovod#118 and many after it).

    Attributes:
        rows: Rows of each shard; at least one has some.
        batch_size: Rows per shard per step, at most.
        world_size: Ranks that train the shards, at most one per shard: shard s belongs to rank s % world_size.

    >>> plan = BatchPlan(rows=(5, 3, 1), batch_size=2, world_size=2)
    >>> plan.steps, [plan.rows_of(1, step) for step in range(plan.steps)]
    (3, [2, 1, 0])
    >>> plan.shards_of(0), [plan.rows_of_rank(0, step) for step in range(plan.steps)]
    (range(0, 3, 2), [3, 2, 1])
    """

    rows: tuple[int, ...]
    batch_size: int
    world_size: int

    @property
    def steps(self) -> int:
        """Steps of one epoch."""
        return -(-max(self.rows) // self.batch_size)

    def shards_of(self, rank: int) -> range:
        return range(rank, len(self.rows), self.world_size)

    def rows_of(self, shard: int, step: int) -> int:
        return min(max(self.rows[shard] - step * self.batch_size, 0), self.batch_size)

    def rows_of_rank(self, rank: int, step: int) -> int:
        return sum(self.rows_of(shard, step) for shard in self.shards_of(rank))

    def total(self, step: int) -> int:
        """Rows of the global batch."""
        return sum(self.rows_of(shard, step) for shard in range(len(self.rows)))


def validation_rows_of(rows: tuple[int, ...], share: float) -> tuple[int, ...]:
    """How many rows of each shard are held out, so that all together hold out what Keras would of all the rows.

    Keras trains on the first `floor(n * (1 - share))` rows (`keras.Model.fit`, validation_split). Rounding in each shard by
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
    config: FitConfig, membership: Membership, shards: Mapping[int, tuple[Shard, Shard]]
) -> tuple[ShardBatches, ShardBatches | None]:
    """The rows to train on, and those to validate on: a set of its own, or the last rows of every shard, or none.

    Args:
        shards: This rank's, by number: the training rows, and the rows of a validation set of its own (perhaps none).
    """
    training = {number: train for number, (train, _) in shards.items()}
    world_size = membership.world.world_size
    held_out = validation_rows_of(membership.rows, config.validation_split)
    kept = tuple(rows - held for rows, held in zip(membership.rows, held_out, strict=True))
    seed = config.seed if config.shuffle else None
    train = ShardBatches(training, BatchPlan(kept, config.batch_size, world_size), seed=seed)
    batch_size = config.validation_batch_size or config.batch_size
    if any(membership.validation_rows):
        plan = BatchPlan(membership.validation_rows, batch_size, world_size)
        return train, ShardBatches({number: validation for number, (_, validation) in shards.items()}, plan)
    if any(held_out):
        return train, ShardBatches(training, BatchPlan(held_out, batch_size, world_size), first_rows=kept)
    return train, None


class ShardBatches:
    """The batches of one rank: a sequence of (x[, y[, sample_weight]]), and what Keras reads of them.

    A batch holds those of the rank's shards, one after the other. A step to which they bring no row still yields a batch of one
    row (a shard's first, or zeros), because layers are not made for empty batches; with JAX, which compiles a step for each
    size of a batch, as many of them as the first step has rows. What is computed from it does not count: `optimizer` weighs it
    with 0 rows and `callbacks` takes back what it did to the metrics.

    Args:
        shards: The rank's shards, by their number in the plan; y and sample_weight may be missing. At least one.
        plan: The same on every rank.
        first_rows: For each shard of the plan, the index of the first row of this data set; `plan.rows` rows follow.
        seed: Seed of the order of rows, or None to keep them as they are.

    Attributes:
        epoch: Which order to use; whoever trains moves it on.
        first_step: Where `dataset` begins: later than 0 in an epoch that is resumed.
        plan, spec: As given, and what a row looks like.
    """

    def __init__(
        self,
        shards: Mapping[int, Shard],
        plan: BatchPlan,
        *,
        first_rows: Sequence[int] | None = None,
        seed: int | None = None,
    ) -> None:
        spec = next(iter(shards.values())).spec
        if spec is None:
            raise DataError("no rank has rows in this data set, so nobody knows what a row looks like")
        self.plan, self.spec, self.epoch, self.first_step = plan, spec, 0, 0
        self._shards, self._seed = dict(sorted(shards.items())), seed
        self._first_rows = [0] * len(plan.rows) if first_rows is None else first_rows
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def __len__(self) -> int:
        return self.plan.steps

    def __getitem__(self, step: int) -> tuple[Any, ...]:
        parts = [self._rows_of(shard, step) for shard in self._shards if self.plan.rows_of(shard, step)]
        if not parts:
            holder = next((shard for shard in self._shards.values() if len(shard)), None)
            count = max(1, sum(self.plan.rows_of(shard, 0) for shard in self._shards)) if ours.IS_STATELESS else 1
            return _as_keras_batch(self.spec.zeros(count) if holder is None else holder.take(np.zeros(count, np.int64)))
        return _as_keras_batch(parts[0] if len(parts) == 1 else keras.tree.map_structure(_joined, *parts))

    def dataset(self) -> Any:
        """The batches in a form that Keras reads, anew in each epoch.

        In an epoch that is resumed it begins at `first_step`. It is as long as ever: who reads must stop after the last step.
        """
        return ours.dataset(self._read, len(self))

    def _read(self, number: int) -> tuple[Any, ...]:
        # Read ahead of the end of a resumed epoch: nobody looks at it.
        return self[min(number + self.first_step, self.plan.steps - 1)]

    def _rows_of(self, shard: int, step: int) -> tuple[Any, Any, Any]:
        start = step * self.plan.batch_size
        rows = np.arange(start, start + self.plan.rows_of(shard, step))
        if self._seed is not None:
            rows = self._order_of(shard, self.epoch, self._seed)[rows]
        return self._shards[shard].take(rows + self._first_rows[shard])

    def _order_of(self, shard: int, epoch: int, seed: int) -> np.ndarray:
        """A random order of a shard's rows; 4 bytes a row, the only memory here that grows with the shard."""
        known = self._orders.get(shard)  # asked for once: the reader of an epoch that was cut short may still be here
        if known is None or known[0] != epoch:
            count = self.plan.rows[shard]
            order = np.arange(count, dtype=np.int32 if count < 2**31 else np.int64)
            np.random.default_rng([seed, epoch, shard]).shuffle(order)
            self._orders[shard] = known = (epoch, order)
        return known[1]


def _joined(*arrays: np.ndarray | None) -> np.ndarray | None:
    """The rows of several shards, one after the other; None for a part of the rows that none of them has."""
    present = [array for array in arrays if array is not None]
    return np.concatenate(present) if present else None


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
