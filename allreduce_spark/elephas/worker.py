"""The workers of Elephas. Here `SparkModel.fit` brings up its ranks itself."""

from __future__ import annotations

from allreduce_spark.elephas.gone import Gone

__all__ = ["AsynchronousSparkWorker", "SparkWorker"]


class SparkWorker(Gone):
    """Ran in each partition, by itself."""

    _instead = "its ranks train together, in a barrier stage. Call SparkModel(model, num_workers=...).fit(rdd, ...)."


class AsynchronousSparkWorker(SparkWorker):
    """Ran in each partition, with a client of the parameter server."""
