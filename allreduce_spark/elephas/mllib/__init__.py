"""Conversions between numpy and Spark MLlib."""

from allreduce_spark.elephas.mllib.adapter import *  # noqa: F403 - as Elephas does
