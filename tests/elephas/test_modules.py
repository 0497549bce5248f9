"""The module tree of Elephas 7.3 is all here, and what can work without a parameter server works."""

from __future__ import annotations

import importlib
import json
import socket
import threading

import numpy as np
import pytest

from allreduce_spark.elephas import optimizers
from allreduce_spark.elephas.enums.frequency import Frequency
from allreduce_spark.elephas.enums.modes import Mode
from allreduce_spark.elephas.utils.functional_utils import add_params, divide_by, get_neutral, subtract_params
from allreduce_spark.elephas.utils.model_utils import LossModelTypeMapper, ModelType, ModelTypeEncoder, as_enum
from allreduce_spark.elephas.utils.notebook_utils import is_running_in_notebook
from allreduce_spark.elephas.utils.rwlock import RWLock
from allreduce_spark.elephas.utils.serialization import bytes_to_weights, weights_to_bytes
from allreduce_spark.elephas.utils.sockets import determine_master, recv_bytes, send_bytes, wait_until_listening
from allreduce_spark.errors import ConfigError, DataError

# Module of `elephas`: the names that scripts import from it.
NAMES = {
    "spark_model": "SparkModel AsynchronousSparkModel SparkMLlibModel load_spark_model save_and_zip_model",
    "ml_model": "ElephasEstimator ElephasTransformer load_ml_estimator load_ml_transformer",
    "worker": "SparkWorker AsynchronousSparkWorker",
    "enums.frequency": "Frequency",
    "enums.modes": "Mode",
    "ml": "to_data_frame from_data_frame df_to_simple_rdd HasMode",
    "ml.adapter": "to_data_frame from_data_frame df_to_simple_rdd",
    "ml.params": "HasKerasModelConfig HasMode HasFrequency HasNumberOfClasses HasCategoricalLabels HasEpochs HasBatchSize "
    "HasVerbosity HasValidationSplit HasNumberOfWorkers HasKerasOptimizerConfig HasMetrics HasLoss HasCustomObjects "
    "HasInferenceBatchSize",
    "mllib": "from_matrix to_matrix from_vector to_vector",
    "mllib.adapter": "from_matrix to_matrix from_vector to_vector",
    "parameter": "BaseParameterServer HttpServer SocketServer BaseParameterClient HttpClient SocketClient",
    "parameter.client": "BaseParameterClient HttpClient SocketClient",
    "parameter.factory": "ClientServerFactory HttpFactory SocketFactory",
    "parameter.server": "BaseParameterServer HttpServer SocketServer",
    "utils": "add_params to_simple_rdd model_to_dict determine_master RWLock",
    "utils.functional_utils": "add_params subtract_params get_neutral divide_by average_and_subtract",
    "utils.model_utils": "ModelType Singleton LossModelTypeMapper ModelTypeEncoder as_enum is_multiple_input_model "
    "is_multiple_output_model",
    "utils.notebook_utils": "is_running_in_notebook",
    "utils.rdd_utils": "to_simple_rdd to_labeled_point from_labeled_point encode_label lp_to_simple_rdd",
    "utils.rwlock": "RWLock",
    "utils.serialization": "model_to_dict dict_to_model weights_to_bytes bytes_to_weights",
    "utils.sockets": "determine_master send_bytes recv_bytes wait_until_listening",
    "utils.versioning_utils": "get_minor_version",
    "optimizers": "SGD RMSprop Adagrad Adadelta Adam get",
}


@pytest.mark.parametrize("module", NAMES)
def test_every_name_of_elephas_can_be_imported_from_its_place(module: str) -> None:
    found = importlib.import_module(f"allreduce_spark.elephas.{module}")
    assert [name for name in NAMES[module].split() if not hasattr(found, name)] == []


def test_a_star_import_of_utils_brings_what_it_brings_in_elephas() -> None:
    namespace: dict[str, object] = {}
    exec("from allreduce_spark.elephas.utils import *", namespace)  # noqa: S102 - not allowed within a function
    assert {"add_params", "to_simple_rdd", "lp_to_simple_rdd", "model_to_dict", "RWLock"} <= set(namespace)


@pytest.mark.parametrize(
    "use",
    ["worker.SparkWorker", "parameter.server.HttpServer", "parameter.client.SocketClient", "spark_model.SparkHFModel"],
)
def test_what_has_no_counterpart_says_what_to_do_instead_when_it_is_used(use: str) -> None:
    module, _, name = use.rpartition(".")
    kind = getattr(importlib.import_module(f"allreduce_spark.elephas.{module}"), name)
    with pytest.raises(ConfigError, match=f"{name} of Elephas has no counterpart.*SparkModel"):
        kind("http", 4000)


def test_a_factory_says_that_there_is_no_parameter_server() -> None:
    from allreduce_spark.elephas.parameter.factory import ClientServerFactory

    with pytest.raises(ConfigError, match="there is no parameter server"):
        ClientServerFactory.get_factory("http")


def test_modes_and_frequencies_are_equal_to_their_words() -> None:
    assert (Mode.HOGWILD, Frequency.BATCH) == ("hogwild", "batch")
    assert json.dumps([Mode.SYNCHRONOUS, Frequency.EPOCH]) == '["synchronous", "epoch"]'


def test_lists_of_arrays_are_added_subtracted_divided_and_zeroed() -> None:
    left, right = [np.array([4.0, 6.0]), np.array([[2.0]])], [np.array([1.0, 2.0]), np.array([[4.0]])]
    np.testing.assert_array_equal(add_params(left, right)[0], [5.0, 8.0])
    np.testing.assert_array_equal(subtract_params(left, right)[1], [[-2.0]])
    np.testing.assert_array_equal(divide_by(left, 2)[0], [2.0, 3.0])
    assert [array.shape for array in get_neutral(left)] == [(2,), (1, 1)]


def test_weights_survive_the_way_through_bytes() -> None:
    weights = [np.arange(6, dtype="float32").reshape(2, 3), np.array(3, "int64"), np.zeros((0, 4), "float16")]
    back = bytes_to_weights(weights_to_bytes(weights))
    for one, other in zip(weights, back, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        np.testing.assert_array_equal(one, other)
    back[0][0, 0] = 7  # the memory is its own
    # The bytes are those of Elephas: count, then dimensions, shape, dtype, length and values.
    assert weights_to_bytes([np.array([1], "uint8")]) == (b"\1\0\0\0\1\1\0\0\0\0\0\0\0\5\0uint8\1\0\0\0\0\0\0\0\1")


@pytest.mark.parametrize("cut", [2, 6, 20, 27])
def test_bytes_that_were_cut_off_are_no_weights(cut: int) -> None:
    with pytest.raises(DataError, match="the bytes end"):
        bytes_to_weights(weights_to_bytes([np.array([1, 2, 3], "uint8")])[:cut])


def test_bytes_of_something_else_are_no_weights() -> None:
    with pytest.raises(DataError, match="no array of dtype"):
        bytes_to_weights(b"\1\0\0\0\0\3\0???\0\0\0\0\0\0\0\0")


def test_readers_share_the_lock_and_a_writer_has_it_alone() -> None:
    lock, seen = RWLock(), []
    lock.acquire_read()
    lock.acquire_read()

    def write() -> None:
        lock.acquire_write()
        seen.append("written")
        lock.release()

    writer = threading.Thread(target=write)
    writer.start()
    lock.release()
    assert seen == []  # one reader is left
    lock.release()
    writer.join(10)
    assert seen == ["written"]
    with pytest.raises(RuntimeError, match="nobody holds"):
        lock.release()


def test_bytes_arrive_framed_and_a_closed_connection_is_an_error() -> None:
    one, other = socket.socketpair()
    with other:
        with one:
            send_bytes(one, b"weights")
            assert recv_bytes(other) == b"weights"
        with pytest.raises(OSError, match="closed after 0 of 4 bytes"):
            recv_bytes(other)


def test_waiting_for_a_listener_ends_when_it_is_there_or_when_the_time_is_over() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        wait_until_listening("127.0.0.1", port, timeout=5)
    with pytest.raises(TimeoutError, match="nothing listens"):
        wait_until_listening("127.0.0.1", port, timeout=0.1)


def test_the_address_of_the_driver_is_the_one_that_spark_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    assert determine_master(5000) == "127.0.0.1:5000"


def test_the_mapper_of_losses_is_one_and_learns_new_ones() -> None:
    def own_loss(y: object, p: object) -> None: ...

    mapper = LossModelTypeMapper()
    assert mapper is LossModelTypeMapper()
    assert mapper.get_model_type("mse") is ModelType.REGRESSION
    assert mapper.get_model_type("binary_crossentropy") is ModelType.CLASSIFICATION
    assert mapper.get_model_type("own_loss") is None
    LossModelTypeMapper().register_loss(own_loss, ModelType.REGRESSION)
    assert mapper.get_model_type("own_loss") is mapper.get_model_type(own_loss) is ModelType.REGRESSION


def test_model_types_survive_the_way_through_json() -> None:
    text = json.dumps({"model_type": ModelType.REGRESSION, "label": "y"}, cls=ModelTypeEncoder)
    assert text == '{"model_type": {"__enum__": "ModelType.REGRESSION"}, "label": "y"}'
    assert json.loads(text, object_hook=as_enum) == {"model_type": ModelType.REGRESSION, "label": "y"}
    with pytest.raises(ConfigError, match="is no ModelType"):
        as_enum({"__enum__": "os.system"})


def test_optimizers_of_the_server_hold_their_settings() -> None:
    assert optimizers.get("rmsprop", {"name": "RMSprop", "lr": 0.5}).get_config() == {
        "name": "RMSprop",
        "lr": 0.5,
        "rho": 0.9,
        "epsilon": 1e-6,
    }
    with pytest.raises(ConfigError, match="no optimizer 'nadam'"):
        optimizers.get("nadam")


def test_this_is_no_notebook() -> None:
    assert is_running_in_notebook() is False
