"""How many ranks stand for Elephas's workers."""

from __future__ import annotations

import warnings

from allreduce_spark.config import Timeouts
from allreduce_spark.errors import ConfigError
from allreduce_spark.spark.cluster import active_context, check_cluster, count_slots

__all__ = ["ranks_for"]


def ranks_for(num_workers: int | None, timeouts: Timeouts) -> int | None:
    """As many ranks as workers are asked for, or as there are slots. Elephas ran workers without a slot one after another."""
    context = active_context()
    try:
        return check_cluster(context, num_workers, timeouts)
    except ConfigError:
        slots = count_slots(context)
        if num_workers is None or not 0 < slots < num_workers:
            raise
    warnings.warn(
        f"num_workers={num_workers}, but this Spark application has {slots} slots: {slots} ranks train, on all the rows.",
        stacklevel=3,
    )
    return slots
