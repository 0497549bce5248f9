"""A drop-in for Elephas: its module tree, names, call shapes and files, over this library's own API.

A script that imports `elephas` runs unchanged with `python -m allreduce_spark.elephas script.py`, or with `elephas`
replaced by `allreduce_spark.elephas` in its imports. Everything is as in Elephas 7.3, and older call shapes are understood
too, but for one thing: there is no parameter server. `spark_model.py` says what its modes become without one.

Like Elephas's own, this module defines nothing.
"""
