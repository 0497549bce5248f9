"""What a rank does before its first step."""

from __future__ import annotations

import keras
import numpy as np

from allreduce_spark.data.spec import LeafSpec, RowSpec
from allreduce_spark.training.job import seed_variables
from allreduce_spark.training.result import build_like
from allreduce_spark.training.state import make_randomness_differ


class Attention(keras.Model):
    """Its attention layer makes a random generator of its own only when it is built."""

    def __init__(self):
        super().__init__()
        self.dropout = keras.layers.Dropout(0.1)
        self.attention = keras.layers.MultiHeadAttention(2, 4, dropout=0.1)

    def call(self, x, training=False):
        return self.dropout(self.attention(x, x, training=training), training=training)


def test_random_generators_that_an_unbuilt_model_did_not_have_yet_are_no_error():
    model = Attention()
    model.compile("sgd", "mse")
    known = [variable.numpy().tolist() for variable in seed_variables(model)]
    build_like(model, RowSpec(LeafSpec("x", "float32", (3, 2))))
    before = [np.array(variable.numpy()) for variable in seed_variables(model)]
    assert len(before) > len(known)
    make_randomness_differ(model, known, rank=1)
    after = [variable.numpy() for variable in seed_variables(model)]
    assert all((one != other).any() for one, other in zip(before, after, strict=True))
