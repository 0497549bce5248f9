"""The parameter server of Elephas, which is gone: see `allreduce_spark.elephas.gone`."""

from allreduce_spark.elephas.parameter.client import *  # noqa: F403 - as Elephas does
from allreduce_spark.elephas.parameter.server import *  # noqa: F403
