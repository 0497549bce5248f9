"""With a Spark Connect session: the model that a classic session trains, the same errors, and nothing left behind.

One server for the module, with two slots, as `sbin/start-connect-server.sh` starts it.
"""

from __future__ import annotations

import _thread
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import keras
import numpy as np
import pyspark
import pytest
from conftest import rank_processes
from faulty_fits import Fault, Outcome, X, Y, fit, kill_agent, kill_rank, raise_error, steps_in, stop_agent
from pyspark import cloudpickle as spark_cloudpickle
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession
from waiting import wait_until

from allreduce_spark import AllReduceEstimator, Checkpoint, SparkModel, Timeouts, run, search
from allreduce_spark.communicator.horovod_environment import installed
from allreduce_spark.errors import CancelledError, ConfigError, DataError, RankFailedError, RendezvousTimeoutError
from allreduce_spark.spark.connect.session import ask_executor
from allreduce_spark.training.settings import KerasSettings

pytest.importorskip("grpc_status", reason="the client of Spark Connect is missing: pip install 'pyspark[connect]'")
pytestmark = [
    pytest.mark.spark,
    pytest.mark.slow,
    pytest.mark.timeout(600),
]

for pickler in (cloudpickle, spark_cloudpickle):
    pickler.register_pickle_by_value(sys.modules[__name__])

with_horovod = pytest.mark.skipif(
    installed() is None, reason="Horovod is not installed: allreduce-spark install-horovod"
)

SERVER = "org.apache.spark.sql.connect.service.SparkConnectServer"
WATCHED = ("loss", "mae", "root_mean_squared_error")
DETACHED_S = 3  # how long the server waits for a client that is gone


def uneven(session: SparkSession) -> DataFrame:
    """83 rows in four partitions, of which one has only few and one none."""
    rows = session.range(0, 100, 1, 4).where("id < 70 or id >= 87 and id % 4 > 0 and id < 99 or id in (70, 71, 72)")
    return rows.selectExpr("array(sin(id), cos(id * 3), id / 100) AS features", "sin(id) * 2 - id / 50 AS label")


def plain() -> keras.Model:
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae", keras.metrics.RootMeanSquaredError()])
    return model


def fit_uneven(session: SparkSession, model: keras.Model) -> dict[str, list[float]]:
    frame = uneven(session)
    history = SparkModel(model, num_ranks=2).fit(
        frame, epochs=2, batch_size=8, seed=4, validation_data=frame, verbose=0
    )
    return dict(history.history)


@pytest.fixture(scope="module")
def on_classic(spark: SparkSession) -> tuple[keras.Model, dict[str, list[float]]]:
    """What a classic session makes of the uneven rows."""
    model = plain()
    return model, fit_uneven(spark, model)


@pytest.fixture(scope="module")
def server(
    own_temporary_folder: str, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[str]:
    """The URL of a Connect server of its own."""
    log = tmp_path_factory.mktemp("connect") / "log"
    settings = {
        "spark.connect.grpc.binding.address": "127.0.0.1",
        "spark.connect.grpc.binding.port": "0",
        "spark.connect.execute.manager.detachedTimeout": f"{DETACHED_S}s",
        "spark.connect.execute.manager.maintenanceInterval": "1s",
        "spark.ui.enabled": "false",
    }
    home = Path(pyspark.__file__).parent
    options = [option for name, value in settings.items() for option in ("--conf", f"{name}={value}")]
    command = [home / "bin" / "spark-submit", "--class", SERVER, "--master", "local[2]", *options]
    # Workers run in a folder of the session, and must find what other tests have registered with Keras.
    path = os.pathsep.join(filter(None, [str(pytestconfig.rootpath), os.environ.get("PYTHONPATH")]))
    own = {"SPARK_HOME": str(home), "SPARK_CONNECT_MODE": "0", "PYSPARK_PYTHON": sys.executable, "PYTHONPATH": path}
    environment = {**os.environ, **own}
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process:
        try:
            deadline = time.monotonic() + 240
            while not (started := re.search(r"started at: *127\.0\.0\.1:(\d+)", log.read_text(errors="replace"))):
                assert process.poll() is None, log.read_text(errors="replace")
                assert time.monotonic() < deadline, log.read_text(errors="replace")
                time.sleep(0.1)
            yield f"sc://127.0.0.1:{started[1]}"
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="module")
def connection(server: str) -> Iterator[SparkSession]:
    from pyspark.sql.connect.session import SparkSession as ConnectSession

    session = ConnectSession.builder.remote(server).getOrCreate()
    yield session  # type: ignore[misc]
    session.stop()


@pytest.fixture
def session(connection: SparkSession, monkeypatch: pytest.MonkeyPatch) -> SparkSession:
    """A Connect session, in a process that has no other for the time of the test."""
    monkeypatch.setenv("SPARK_CONNECT_MODE_ENABLED", "1")  # as SparkSession.builder.remote does, for good
    return connection


@pytest.fixture
def no_process_is_left(own_temporary_folder: str) -> Iterator[None]:
    """After the test there are no ranks, nor what leads them."""
    before = processes(own_temporary_folder)
    yield
    wait_until(lambda: processes(own_temporary_folder) <= before, "no process is left", 60)


def processes(temporary_folder: str) -> set[int]:
    found = rank_processes(temporary_folder)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            leads = b"allreduce_spark.spark.connect.driver" in (process / "cmdline").read_bytes()
            if leads and temporary_folder.encode() in (process / "environ").read_bytes():
                found.add(int(process.name))
        except OSError:
            pass  # it has ended meanwhile
    return found


def assert_close(outcome: Outcome, expected: Outcome) -> None:
    for mine, theirs in zip(outcome.weights + outcome.optimizer, expected.weights + expected.optimizer, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-6)
    assert outcome.history.keys() == expected.history.keys()
    for name, values in expected.history.items():
        np.testing.assert_allclose(outcome.history[name], values, rtol=1e-6, err_msg=name)


@pytest.mark.support(place="connect")
@pytest.mark.parametrize(
    "backend", ["mpi", *(pytest.param(name, marks=with_horovod) for name in ("horovod", "horovod-mpi"))]
)
def test_arrays_give_the_weights_and_the_history_of_a_classic_session(
    session: SparkSession, undisturbed: Outcome, nothing_is_left: None, no_process_is_left: None, backend: str
) -> None:
    assert_close(fit(max_restarts=0, backend=backend), undisturbed)


@pytest.mark.support(place="connect", backend="mpi")
def test_frames_are_trained_validated_evaluated_and_predicted_as_with_a_classic_session(
    session: SparkSession, on_classic: tuple[keras.Model, dict[str, list[float]]], nothing_is_left: None
) -> None:
    expected, expected_history = on_classic
    model, frame = plain(), uneven(session)
    history = fit_uneven(session, model)
    for mine, theirs in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-6)
    assert history.keys() == expected_history.keys() == {*WATCHED, *(f"val_{name}" for name in WATCHED)}
    for name, values in expected_history.items():
        np.testing.assert_allclose(history[name], values, rtol=1e-6, err_msg=name)

    rows = frame.collect()
    x, y = np.array([row.features for row in rows], "float32"), np.array([[row.label] for row in rows], "float32")
    spark_model = SparkModel(model)
    in_one_process = model.evaluate(x, y, return_dict=True, verbose=0)
    for data in (frame, (x, y)):
        assert spark_model.evaluate(data) == pytest.approx(in_one_process, rel=1e-4)
        np.testing.assert_allclose(spark_model.predict(data), model.predict(x, verbose=0), rtol=1e-5, atol=1e-6)
    with pytest.raises(DataError, match="the data has no rows"):
        spark_model.predict(frame.limit(0))


class OwnLayers(keras.Model):
    """Makes its layer in the constructor, of whatever type is the usual one where it is called."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.dense = keras.layers.Dense(1)

    def call(self, x: Any) -> Any:
        return self.dense(x)


def test_ranks_and_workers_compute_with_the_types_of_the_client(session: SparkSession) -> None:
    before = KerasSettings.here()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    try:
        x, models = np.random.default_rng(0).normal(size=(64, 3)), []
        for _ in range(2):
            keras.utils.set_random_seed(1)
            models.append(OwnLayers())
            models[-1](x)
            models[-1].compile("sgd", "mse")
        ours, expected = models
        expected.fit(x, x[:, :1], batch_size=16, shuffle=False, verbose=0)
        model = SparkModel(ours, num_ranks=2)
        model.fit((x, x[:, :1]), batch_size=8, shuffle=False, verbose=0)
        predictions, loss = model.predict(x), model.evaluate((x, x[:, :1]))["loss"]
        assert predictions.dtype == np.float64
        np.testing.assert_allclose(predictions, expected.predict(x, verbose=0), rtol=1e-12)
        assert loss == pytest.approx(expected.evaluate(x, x[:, :1], verbose=0), rel=1e-12)
        assert run(lambda communicator: KerasSettings.here()) == [KerasSettings.here()] * 2
    finally:
        before.set()


def test_structures_of_outputs_and_the_order_of_many_blocks_come_through(session: SparkSession) -> None:
    inputs = keras.Input((256,), name="pixels")
    model = keras.Model(
        inputs,
        {"sum": keras.layers.Dense(1, kernel_initializer="ones")(inputs), "same": keras.layers.Identity()(inputs)},
    )
    x = np.repeat(np.arange(20_000, dtype="float32")[:, None], 256, 1)  # 20 MB, five blocks
    predictions = SparkModel(compiled_for_two(model)).predict(x, batch_size=5000)
    np.testing.assert_array_equal(predictions["same"], x)
    np.testing.assert_allclose(predictions["sum"][:, 0], 256 * x[:, 0], rtol=1e-5)


def compiled_for_two(model: keras.Model) -> keras.Model:
    model.compile("sgd", {"sum": "mse", "same": "mse"})
    return model


@pytest.mark.support(place="connect", backend="mpi")
def test_a_fit_that_failed_is_gone_on_with_and_survives_the_loss_of_ranks_and_of_a_stage(
    session: SparkSession,
    undisturbed: Outcome,
    tmp_path: Path,
    no_process_is_left: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = Checkpoint(str(tmp_path / "store"), every_steps=2)
    failing, going_on = tmp_path / "failing", tmp_path / "going on"
    failing.mkdir()
    going_on.mkdir()
    with pytest.raises(RankFailedError, match="the license server did not answer") as caught:
        fit(Fault("train_batch_end", 1, raise_error, 1, 4), folder=failing, checkpoint=store, max_restarts=0)
    assert (caught.value.rank, caught.value.epoch) == (1, 1)
    with pytest.raises(ConfigError, match="resume='auto'"):  # the store is looked at from where it is used
        fit(checkpoint=store)

    faults = Fault("train_batch_end", 1, kill_rank, 2, 1), Fault("train_batch_end", 1, kill_agent, 3, 1)
    with caplog.at_level(logging.WARNING, "allreduce_spark"):
        outcome = fit(*faults, folder=going_on, checkpoint=store, resume="auto", pause_s=0.05)
    outcome.check_is_close_to(undisturbed)
    assert "another barrier stage goes on from epoch" in caplog.text


def test_what_is_wrong_with_rows_arguments_and_slots_is_said_in_our_own_words(
    session: SparkSession, tmp_path: Path, nothing_is_left: None
) -> None:
    spark_model = SparkModel(plain(), num_ranks=2)
    bad = session.range(0, 40, 1, 3).selectExpr("array(1D, 2D, 3D) AS features", "IF(id = 33, NULL, 1D) AS label")
    with pytest.raises(DataError, match="partition 2, row 7"):
        spark_model.fit(bad, verbose=0)
    with pytest.raises(DataError, match="the training data has no rows"):
        spark_model.fit(uneven(session).where("label > 1000"), verbose=0)
    with pytest.raises(DataError, match="no column 'label'"):
        spark_model.fit(bad.select("features"), verbose=0)
    with pytest.raises(DataError, match=r"shape \(3,\)"):
        spark_model.predict(np.zeros((4, 5), "float32"))
    with pytest.raises(
        DataError, match=r"expected arrays \(x, y\) or .*, or a Spark DataFrame\. .* spark\.createDataFrame"
    ):
        spark_model.fit([1, 2, 3, 4], verbose=0)

    def fail(batches: Iterator[Any]) -> Iterator[Any]:
        yield from batches
        raise ZeroDivisionError("in a function of the user's own")

    for call in (spark_model.predict, spark_model.evaluate):
        with pytest.raises(PySparkException, match="ZeroDivisionError: in a function of the user's own"):
            call(uneven(session).mapInArrow(fail, uneven(session).schema))
    with pytest.raises(ConfigError, match=r"num_ranks=3 needs 3 slots at once, .* has 2"):
        SparkModel(plain(), num_ranks=3).fit((X[:, :3], Y), verbose=0)
    with pytest.raises(ConfigError, match="fit, predict, evaluate"):
        search(lambda values: plain(), {"units": [1]}, (X[:, :3], Y), max_trials=1, epochs=1, validation_split=0.2)

    # Somebody else has one of the two slots.
    def occupy(batches: Iterator[Any]) -> Iterator[Any]:
        (tmp_path / "occupied").touch()
        time.sleep(60)
        yield from batches

    tag = "somebody-else"
    thread = threading.Thread(
        target=partial(_collect, session.range(0, 1, 1, 1).mapInArrow(occupy, "id long"), session, tag)
    )
    thread.start()
    try:
        wait_until((tmp_path / "occupied").exists, "the slot is taken", 60)
        with pytest.raises(ConfigError, match="2 free slots at once, and for 4 s no task ran"):
            SparkModel(plain(), num_ranks=2, timeouts=Timeouts(slots_s=4)).fit((X[:, :3], Y), verbose=0)
    finally:
        session.interruptTag(tag)
        thread.join(30)


def _collect(frame: DataFrame, session: SparkSession, tag: str) -> None:
    session.addTag(tag)
    with pytest.raises(Exception, match="OPERATION_CANCELED"):
        frame.collect()


def test_rows_that_never_come_are_waited_for_until_spool_s_is_over(
    session: SparkSession, nothing_is_left: None
) -> None:
    def hang(batches: Iterator[Any]) -> Iterator[Any]:
        time.sleep(60)
        yield from batches

    frame = uneven(session)
    rows = frame.repartition(2).mapInArrow(hang, frame.schema)
    with pytest.raises(
        RendezvousTimeoutError, match=r"for 3 s nothing has moved in Spark's stages .* Timeouts\.spool_s"
    ):
        SparkModel(plain(), num_ranks=2, timeouts=Timeouts(spool_s=3)).fit(rows, verbose=0)
    assert len(SparkModel(plain(), num_ranks=2).fit(frame, verbose=0).history["loss"]) == 1, "the slots are free again"


def test_an_executor_that_does_not_answer_is_given_up(session: SparkSession, nothing_is_left: None) -> None:
    timeouts = Timeouts(slots_s=5, checkpoint_s=1, silence_s=3)
    with pytest.raises(ConfigError, match=r"has not answered for 9 s. Setting: Timeouts\.checkpoint_s"):
        ask_executor(session, partial(time.sleep, 60), timeouts)
    assert ask_executor(session, lambda: "the slot is free again", Timeouts()) == "the slot is free again"


def test_ranks_may_train_for_longer_than_spool_s(session: SparkSession, nothing_is_left: None) -> None:
    def train(communicator: Any) -> int:
        time.sleep(20)
        return int(communicator.rank)

    assert run(train, timeouts=Timeouts(spool_s=12)) == [0, 1]


@pytest.mark.parametrize("rank", [1, 0])
def test_a_task_that_is_stuck_ends_the_stage_once_silence_s_is_over(
    session: SparkSession, tmp_path: Path, no_process_is_left: None, rank: int
) -> None:
    fault = Fault("train_batch_end", rank, stop_agent, 0, 1)
    timeouts = Timeouts(silence_s=10, teardown_s=5)
    with pytest.raises(RankFailedError) as caught:
        fit(fault, folder=tmp_path, timeouts=timeouts, max_restarts=0)
    # Rank 0's task is the only one that could have said which it was.
    assert ("Timeouts.silence_s" if rank else "Python worker exited unexpectedly") in str(caught.value)
    assert caught.value.rank == (1 if rank else None)


@pytest.mark.parametrize("how", ["Ctrl-C", "interruptTag"])
def test_who_interrupts_a_fit_ends_its_ranks(
    session: SparkSession, tmp_path: Path, no_process_is_left: None, how: str
) -> None:
    def interrupt() -> None:
        wait_until(lambda: steps_in(tmp_path) > 3, "the ranks train", 120)
        if how == "Ctrl-C":
            _thread.interrupt_main()
        else:
            session.interruptTag("mine")

    thread = threading.Thread(target=interrupt)
    session.addTag("mine")
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt if how == "Ctrl-C" else CancelledError):
            fit(folder=tmp_path, pause_s=0.3)
    finally:
        session.removeTag("mine")
        thread.join(30)


def test_the_ranks_of_a_client_that_is_gone_do_not_outlive_it_for_long(
    session: SparkSession, server: str, tmp_path: Path, no_process_is_left: None
) -> None:
    wish = {"remote": server, "folder": str(tmp_path / "marks"), "store": str(tmp_path / "store"), "fault": "driver"}
    program = Path(__file__).parent / "faulty_fits.py"
    environment = {name: value for name, value in os.environ.items() if name != "SPARK_CONNECT_MODE_ENABLED"}
    client = subprocess.run(
        [sys.executable, program, json.dumps({**wish, "pause_s": 0.2})], timeout=120, env=environment
    )
    assert client.returncode == -signal.SIGKILL


def test_a_module_of_the_users_own_reaches_the_ranks_as_an_artifact(session: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "an_artifact.py").write_text("ANSWER = 42\n")

    def answer(communicator: Any) -> int:
        import an_artifact

        return int(an_artifact.ANSWER)

    with pytest.raises(RankFailedError, match=r"No module named 'an_artifact'.*addArtifacts\(path, pyfile=True\)"):
        run(answer)
    session.addArtifacts(str(tmp_path / "an_artifact.py"), pyfile=True)
    assert run(answer) == [42, 42]


def test_functions_the_estimator_and_the_transformer_work_too(session: SparkSession, nothing_is_left: None) -> None:
    def rank_and_sum(communicator: Any, offset: int) -> tuple[int, float]:
        total = np.array([communicator.rank + offset], "float32")
        communicator.allreduce(total)
        return communicator.rank, float(total[0])

    assert run(rank_and_sum, 10) == [(0, 21.0), (1, 21.0)]

    frame = uneven(session)
    estimator = AllReduceEstimator(model=plain(), numRanks=2, epochs=1, verbose=0)
    transformer = estimator.fit(frame)
    rows = transformer.transform(frame).collect()
    x = np.array([row.features for row in rows], "float32")
    np.testing.assert_allclose(
        [row.prediction for row in rows], transformer.model.predict(x, verbose=0)[:, 0], rtol=1e-5, atol=1e-6
    )
