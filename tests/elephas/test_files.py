"""Files that Elephas 6.2 and 7.3 wrote are read; files written here are read again, where Elephas's own way fails.

The files, and what the models in them predict, were made with the real thing: see files/make_files.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.linalg import Vectors
from pyspark.sql import DataFrame, SparkSession

from allreduce_spark.elephas.ml_model import (
    ElephasEstimator,
    ElephasTransformer,
    load_ml_estimator,
    load_ml_transformer,
)
from allreduce_spark.elephas.spark_model import AsynchronousSparkModel, SparkMLlibModel, SparkModel, load_spark_model
from allreduce_spark.elephas.utils.model_utils import ModelType
from allreduce_spark.elephas.utils.serialization import dict_to_model, model_to_dict
from allreduce_spark.errors import ConfigError

FILES = Path(__file__).parent / "files"


def expected(version: int) -> dict[str, Any]:
    return dict(json.loads((FILES / f"elephas{version}_expected.json").read_text()))


def classifier(width: int = 4) -> keras.Model:
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(width), keras.layers.Dense(2, activation="softmax")]
    )
    model.compile("adam", "categorical_crossentropy", metrics=["acc"])
    return model


@pytest.fixture
def frame(spark: SparkSession) -> DataFrame:
    rows = [(Vectors.dense(x),) for x in expected(7)["x"]]
    return spark.createDataFrame(rows, ["features"]).coalesce(1)


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("kind", ["spark_model", "mllib_model", "asynchronous_model"])
def test_a_spark_model_of_elephas_is_read_with_all_its_settings(version: int, kind: str) -> None:
    name = f"elephas{version}_{kind}.h5"
    known = expected(version)
    spark_model = load_spark_model(str(FILES / name))
    assert type(spark_model).__name__ == known[name]["class_name"]
    assert json.loads(json.dumps(spark_model.get_config())) == known[name]["config"]
    predictions = spark_model.master_network.predict(np.array(known["x"]), verbose=0)
    np.testing.assert_allclose(predictions, known[name]["prediction"], rtol=1e-5, atol=1e-6)
    if version == 7:  # Keras 2 kept another state than Keras 3
        assert int(spark_model.master_network.optimizer.iterations) == known[name]["iterations"]


def test_the_optimizer_of_an_elephas_file_goes_on_where_it_was() -> None:
    known = expected(7)["elephas7_asynchronous_model.h5"]
    assert known["iterations"] == 4
    model = load_spark_model(str(FILES / "elephas7_asynchronous_model.h5")).master_network
    assert int(model.optimizer.iterations) == 4
    assert any(np.any(variable.numpy()) for variable in model.optimizer.variables[2:])  # Adam's moments


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_an_estimator_of_elephas_is_read(version: int, kind: str) -> None:
    name = f"elephas{version}_estimator_{kind}.h5"
    config = expected(version)[name]["config"]
    estimator = load_ml_estimator(str(FILES / name))
    assert {key: estimator.get_config()[key] for key in config} == config
    assert estimator.get_model().count_params() > 0


@pytest.mark.spark
@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_a_transformer_of_elephas_is_read_and_predicts_the_same(version: int, kind: str, frame: DataFrame) -> None:
    name = f"elephas{version}_transformer_{kind}.h5"
    transformer = load_ml_transformer(str(FILES / name))
    result = transformer.transform(frame)
    assert result.schema["prediction"].dataType.simpleString() == (
        "double" if kind == "regression" else "array<double>"
    )
    predictions = [row.prediction for row in result.collect()]
    np.testing.assert_allclose(predictions, expected(version)[name]["prediction"], rtol=1e-5, atol=1e-6)
    assert transformer.model_type is (ModelType.REGRESSION if kind == "regression" else ModelType.CLASSIFICATION)


@pytest.mark.parametrize("ending", [".h5", ".keras"])
@pytest.mark.parametrize("kind", [SparkModel, AsynchronousSparkModel, SparkMLlibModel])
def test_a_spark_model_is_saved_and_loaded_in_both_formats(kind: type[SparkModel], ending: str, tmp_path: Path) -> None:
    spark_model = kind(classifier(), num_workers=2, foo="bar", mode="hogwild", frequency="batch")
    path = str(tmp_path / f"model{ending}")
    spark_model.save(path)
    with pytest.raises(ConfigError, match="exists"):
        spark_model.save(path)
    spark_model.save(path, overwrite=True)
    for loaded in (load_spark_model(path), kind.load(path)):
        assert type(loaded) is kind
        assert loaded.get_config() == spark_model.get_config()
        for mine, theirs in zip(loaded.weights, spark_model.weights, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    with pytest.raises(ConfigError, match=r"must end in \.keras"):
        spark_model.save(str(tmp_path / "model.pickle"))


def test_a_model_with_a_loss_by_name_and_own_objects_is_loaded_again(tmp_path: Path) -> None:
    def own(x: Any) -> Any:
        return x * 2.0

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, activation=own)])
    model.compile("sgd", "mse")
    path = str(tmp_path / "model.h5")
    SparkModel(model, custom_objects={"own": own}).save(path)
    loaded = load_spark_model(path, custom_objects={"own": own})
    assert (loaded.master_loss, loaded.custom_objects) == ("mse", {"own": own})


@pytest.mark.spark
def test_hadoop_is_the_file_system_that_spark_knows_as_the_default(spark: SparkSession, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "model.keras"
    SparkModel(classifier(), num_workers=2).save(str(path), to_hadoop=True)
    assert path.is_file()
    assert load_spark_model(str(path), from_hadoop=True).num_workers == 2
    with pytest.raises(ConfigError, match="exists already; pass overwrite=True"):
        SparkModel(classifier(), num_workers=3).save(str(path), to_hadoop=True)
    SparkModel(classifier(), num_workers=3).save(str(path), overwrite=True, to_hadoop=True)
    assert load_spark_model(path.as_uri(), from_hadoop=True).num_workers == 3
    assert [each.name for each in path.parent.iterdir() if each.suffix != ".crc"] == ["model.keras"]
    with pytest.raises(ConfigError, match="there is no such file"):
        load_spark_model(str(tmp_path / "none.h5"), from_hadoop=True)


def test_files_of_another_kind_are_refused_by_name(tmp_path: Path) -> None:
    estimator, model = (str(FILES / f"elephas7_{kind}.h5") for kind in ("estimator_regression", "spark_model"))
    with pytest.raises(ConfigError, match="no Keras model"):
        load_spark_model(estimator)
    with pytest.raises(ConfigError, match="holds SparkModel, expected ElephasEstimator"):
        load_ml_estimator(model)
    with pytest.raises(ConfigError, match="holds SparkModel, expected ElephasTransformer"):
        load_ml_transformer(model)
    plain = str(tmp_path / "plain.keras")
    classifier().save(plain)
    with pytest.raises(ConfigError, match=r"holds a plain Keras model, expected one of .*'SparkModel'"):
        load_spark_model(plain)
    with pytest.raises(ConfigError, match="is no file of Elephas"):
        load_ml_estimator(plain)
    classifier().save(str(tmp_path / "plain.h5"))
    with pytest.raises(ConfigError, match="holds no object of Elephas, expected ElephasEstimator"):
        load_ml_estimator(str(tmp_path / "plain.h5"))
    cut = tmp_path / "cut.h5"
    cut.write_bytes((FILES / "elephas7_estimator_regression.h5").read_bytes()[:1000])
    with pytest.raises(ConfigError, match="damaged"):
        load_ml_estimator(str(cut))
    with pytest.raises(ConfigError, match="no such file"):
        load_ml_estimator(str(tmp_path / "absent.h5"))


@pytest.mark.spark
def test_a_transformer_of_any_size_is_saved_and_loaded(frame: DataFrame, tmp_path: Path) -> None:
    model = classifier(width=20_000)  # far more than the 64 KiB that an HDF5 attribute holds
    transformer = ElephasTransformer(
        keras_model_config=model.to_json(),
        weights=model.get_weights(),
        model_type=ModelType.CLASSIFICATION,
        history=[{"loss": [1.0]}],
        outputCol="out",
    )
    path = str(tmp_path / "transformer.h5")
    transformer.save(path)
    loaded = load_ml_transformer(path)
    assert (loaded.history, loaded.model_type) == ([{"loss": [1.0]}], ModelType.CLASSIFICATION)
    outputs = [[row.out for row in one.transform(frame).collect()] for one in (transformer, loaded)]
    PipelineModel([transformer]).save(str(tmp_path / "pipeline"))
    (stage,) = PipelineModel.load(str(tmp_path / "pipeline")).stages
    outputs.append([row.out for row in stage.transform(frame).collect()])
    assert (stage.history, stage.model_type) == (loaded.history, loaded.model_type)
    np.testing.assert_array_equal(outputs[0], outputs[1])
    np.testing.assert_array_equal(outputs[0], outputs[2])
    np.testing.assert_allclose(outputs[0], model.predict(np.array(expected(7)["x"]), verbose=0), rtol=1e-4, atol=1e-6)


def test_an_estimator_with_a_long_model_is_saved_as_elephas_saves_it(tmp_path: Path) -> None:
    layers = [keras.layers.Dense(1, name=f"layer_{index}") for index in range(150)]
    model = keras.Sequential([keras.Input((3,)), *layers])
    estimator = ElephasEstimator(keras_model_config=model.to_json(), loss="mse", epochs=3, custom_objects={"a": len})
    path = str(tmp_path / "estimator.h5")
    estimator.save(path)
    with h5py.File(path) as file:
        about = json.loads(file.attrs["distributed_config"])
    assert about["class_name"] == "ElephasEstimator"
    assert len(about["config"]["keras_model_config"]) > 65_536
    assert load_ml_estimator(path).get_config() == estimator.get_config() == about["config"]


def test_an_estimator_with_a_loss_that_has_no_name_cannot_be_saved(tmp_path: Path) -> None:
    estimator = ElephasEstimator(keras_model_config="{}", loss=keras.losses.Huber())
    with pytest.raises(ConfigError, match=r"a param of ElephasEstimator cannot be saved.*by name"):
        estimator.save(str(tmp_path / "estimator.h5"))


@pytest.mark.spark
def test_a_pipeline_with_an_estimator_is_saved_and_loaded(spark: SparkSession, tmp_path: Path) -> None:
    estimator = ElephasEstimator(
        keras_model_config=classifier().to_json(), loss="mse", optimizer_config={"name": "SGD"}
    )
    Pipeline(stages=[estimator]).save(str(tmp_path / "pipeline"))
    (stage,) = Pipeline.load(str(tmp_path / "pipeline")).getStages()
    assert isinstance(stage, ElephasEstimator)
    assert stage.get_config() == estimator.get_config()


def test_a_model_survives_the_way_through_a_dict() -> None:
    model = classifier()
    again = dict_to_model(model_to_dict(model))
    x = np.ones((2, 3))
    np.testing.assert_array_equal(again.predict(x, verbose=0), model.predict(x, verbose=0))
