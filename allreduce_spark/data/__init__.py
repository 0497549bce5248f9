"""Rows on their way to a rank: columnar Arrow blocks, and the shard that one rank reads. No Spark, no Keras."""
