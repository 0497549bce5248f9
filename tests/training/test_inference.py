"""evaluate for the rows of one partition, whatever they have."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from allreduce_spark.data import arrays_to_blocks
from allreduce_spark.training.inference import evaluate_rows, result_of
from allreduce_spark.training.scoring import pack


def test_rows_with_weights_and_no_labels_are_evaluated_by_a_model_without_loss(tmp_path):
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3, activity_regularizer="l2")])
    model.compile("sgd", loss=None)
    x, weight = np.random.default_rng(0).normal(size=(6, 8)).astype("float32"), np.ones(6, "float32")
    blocks = [block for _, block in arrays_to_blocks(x, None, weight, role="train", num_shards=1)]
    part = evaluate_rows(pack(model), 2, blocks, tmp_path)
    assert part is not None
    assert not list(tmp_path.iterdir())
    assert part.example[1] is None
    assert result_of(model, [part])["loss"] == pytest.approx(model.evaluate(x, verbose=0, return_dict=True)["loss"])
