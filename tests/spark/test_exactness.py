"""Through Spark, agents and MPI processes: ranks end where plain Keras ends on the same rows."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from sklearn.datasets import load_digits

from allreduce_spark import SparkModel
from allreduce_spark.communicator.horovod_environment import installed

pytestmark = pytest.mark.spark


def network():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


@pytest.mark.parametrize("backend", ["mpi", "horovod", "horovod-mpi"])
@pytest.mark.support(place="local")
def test_two_ranks_on_digits_end_with_the_weights_and_the_accuracy_of_plain_keras(spark, backend):
    if backend != "mpi" and installed() is None:
        pytest.skip("Horovod is not installed: allreduce-spark install-horovod")
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32")
    train, held_out = (x[:1500], y[:1500]), (x[1500:], y[1500:])
    plain, ours = network(), network()
    # Rows are dealt out one by one, so two unshuffled ranks with 32 rows each have the global batches of one with 64.
    arguments = {"epochs": 4, "shuffle": False, "validation_split": 0.1, "verbose": 0}
    theirs = plain.fit(*train, batch_size=64, **arguments).history
    history = SparkModel(ours, num_ranks=2, backend=backend).fit(train, batch_size=32, **arguments).history

    for variable, weight, expected in zip(plain.weights, ours.get_weights(), plain.get_weights(), strict=True):
        assert np.abs(weight - expected).max() < 1e-4 * np.abs(expected).max(), variable.path
    assert ours.optimizer.iterations.numpy() == plain.optimizer.iterations.numpy()
    assert history.keys() == theirs.keys()
    for name, values in theirs.items():
        np.testing.assert_allclose(history[name], values, rtol=1e-3, err_msg=name)
    accuracies = [model.evaluate(*held_out, verbose=0)[1] for model in (ours, plain)]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.01)
    assert accuracies[0] > 0.8  # of ten classes: something was learned
