"""What the Spark ML classes of `elephas.ml_model` are made of."""

from allreduce_spark.elephas.ml.adapter import *  # noqa: F403 - as Elephas does
from allreduce_spark.elephas.ml.params import *  # noqa: F403
