"""Through Spark with Horovod: the weights that MPI gives, the first cause of a failure, and ranks that are started again."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from faulty_fits import Fault, Outcome, fit, kill_rank, raise_error
from pyspark.sql import SparkSession

from allreduce_spark import SparkModel
from allreduce_spark.communicator.horovod_environment import installed
from allreduce_spark.errors import ConfigError, MissingDependencyError, RankFailedError

pytestmark = pytest.mark.spark
with_horovod = pytest.mark.skipif(
    installed() is None, reason="Horovod is not installed: allreduce-spark install-horovod"
)
horovods = pytest.mark.parametrize("backend", ["horovod", "horovod-mpi"])


@with_horovod
@horovods
def test_horovod_ends_with_the_weights_and_the_history_of_mpi(
    undisturbed: Outcome, nothing_is_left: None, backend: str
) -> None:
    outcome = fit(backend=backend, max_restarts=0)
    for ours, theirs in zip(
        outcome.weights + outcome.optimizer, undisturbed.weights + undisturbed.optimizer, strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    assert outcome.history.keys() == undisturbed.history.keys()
    for name, values in undisturbed.history.items():
        np.testing.assert_allclose(outcome.history[name], values, rtol=1e-6, err_msg=name)


@with_horovod
@horovods
@pytest.mark.parametrize(("deed", "words"), [(kill_rank, "killed by SIGKILL"), (raise_error, "license server")])
def test_the_rank_that_failed_is_named_and_not_those_that_lost_it(
    spark: SparkSession, nothing_is_left: None, tmp_path: Path, backend: str, deed, words: str
) -> None:
    with pytest.raises(RankFailedError, match=words) as caught:
        fit(Fault("train_batch_end", 1, deed, 0, 3), folder=tmp_path, backend=backend, max_restarts=0)
    assert caught.value.rank == 1


@with_horovod
@horovods
def test_ranks_of_horovod_that_die_are_started_again_and_end_with_the_same_weights(
    undisturbed: Outcome, nothing_is_left: None, tmp_path: Path, caplog: pytest.LogCaptureFixture, backend: str
) -> None:
    faults = (
        Fault("train_begin", 1, kill_rank),
        Fault("train_batch_end", 0, kill_rank, 0, 3),
        Fault("test_batch_end", 1, kill_rank, 1, 0),
    )
    with caplog.at_level(logging.WARNING, "allreduce_spark"):
        fit(*faults, folder=tmp_path, backend=backend).check_is_close_to(undisturbed)
    assert "the rank process was killed by SIGKILL" in caplog.text


@pytest.mark.skipif(installed() is not None, reason="Horovod is installed")
def test_executors_without_horovod_are_an_error_that_says_how_to_install_it(
    spark: SparkSession, nothing_is_left: None
) -> None:
    with pytest.raises(MissingDependencyError, match="allreduce-spark install-horovod"):
        fit(backend="horovod")


def test_a_backend_that_does_not_exist_is_refused() -> None:
    from faulty_fits import compiled

    with pytest.raises(ConfigError, match="'mpi', 'horovod', 'horovod-mpi', 'auto', got 'gloo'"):
        SparkModel(compiled(), backend="gloo")
