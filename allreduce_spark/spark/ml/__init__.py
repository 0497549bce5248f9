"""Spark ML: a Keras model as an estimator and a transformer, for pipelines, cross-validation and persistence."""
