"""The command `allreduce-spark`."""
