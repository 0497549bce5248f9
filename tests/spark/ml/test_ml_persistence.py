"""Estimators, transformers and whole pipelines on disk: what comes back is what was saved, or a clear refusal."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.feature import VectorAssembler
from pyspark.sql import DataFrame, SparkSession

from allreduce_spark.errors import ConfigError
from allreduce_spark.spark.ml.estimator import AllReduceEstimator
from allreduce_spark.spark.ml.transformer import AllReduceTransformer

pytestmark = pytest.mark.spark

X = np.random.default_rng(0).normal(size=(12, 2))


def trained() -> keras.Model:
    """A model whose optimizer has a state."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="last")])
    model.compile(keras.optimizers.Adam(0.1), keras.losses.Huber(0.5), metrics=["mae"])
    model.fit(X, X.sum(axis=1), epochs=2, verbose=0)
    return model


def table(spark: SparkSession) -> DataFrame:
    return spark.createDataFrame(X.tolist(), "a double, b double")


def assert_same_state(model: keras.Model, other: keras.Model) -> None:
    variables, others = (list(m.variables) + list(m.optimizer.variables) for m in (model, other))
    for mine, theirs in zip(variables, others, strict=True):
        np.testing.assert_array_equal(mine.numpy(), theirs.numpy(), err_msg=mine.path)


LOAD_ELSEWHERE = """
    import json, sys
    from pyspark.ml import PipelineModel
    from pyspark.sql import SparkSession

    spark = SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
    pipeline = PipelineModel.load(sys.argv[1])
    frame = spark.createDataFrame([tuple(row) for row in json.loads(sys.argv[2])], "a double, b double")
    print(json.dumps([row.prediction for row in pipeline.transform(frame).collect()]))
    spark.stop()
"""


def test_a_saved_pipeline_is_loaded_by_another_process_and_predicts_the_same(
    spark: SparkSession, tmp_path: Path
) -> None:
    assembler = VectorAssembler(inputCols=["a", "b"], outputCol="features")
    estimator = AllReduceEstimator(
        model=trained(), labelCol="a", numRanks=1, epochs=1, weightCol="b", handleInvalid="skip"
    )
    pipeline = Pipeline(stages=[assembler, estimator])
    pipeline.write().overwrite().save(str(tmp_path / "pipeline"))
    loaded = Pipeline.load(str(tmp_path / "pipeline"))
    assert [stage.uid for stage in loaded.getStages()] == [assembler.uid, estimator.uid]
    fitted = loaded.fit(table(spark).selectExpr("a", "abs(b) AS b"))
    fitted.save(str(tmp_path / "fitted"))
    (metadata,) = (tmp_path / "fitted" / "stages").glob(f"1_{estimator.uid}/metadata/part-*")
    assert json.loads(metadata.read_text())["class"] == "allreduce_spark.AllReduceTransformer"  # wherever it is defined

    expected = [row.prediction for row in fitted.transform(table(spark)).collect()]
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOAD_ELSEWHERE), str(tmp_path / "fitted"), json.dumps(X.tolist())],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYSPARK_PYTHON": sys.executable},
    )
    assert result.returncode == 0, result.stderr
    np.testing.assert_allclose(json.loads(result.stdout.splitlines()[-1]), expected, rtol=1e-6)
    assert PipelineModel.load(str(tmp_path / "fitted")).stages[1].history == fitted.stages[1].history


@pytest.mark.parametrize("name", ["folder", "file.keras", "file.h5", "uri"])
def test_params_and_the_state_of_the_model_come_back(spark: SparkSession, tmp_path: Path, name: str) -> None:
    path = f"file://{tmp_path}/a folder" if name == "uri" else str(tmp_path / name)
    estimator = AllReduceEstimator(
        model=trained(), featuresCols=["a", "b"], epochs=3, seed=7, classWeight={0: 1.0, 1: 2.0}, callbacks=[]
    )
    transformer = AllReduceTransformer(trained(), history={"loss": [1.0], "f1": [np.ones(2)]}, predictionCol="p")
    for saved in (estimator, transformer):
        saved.write().overwrite().save(path)
        loaded = type(saved).load(path)
        assert loaded.uid == saved.uid
        params = {param.name: value for param, value in saved.extractParamMap().items()}
        again = {param.name: value for param, value in loaded.extractParamMap().items()}
        models = (
            [values.pop("model", None) for values in (params, again)]
            if saved is estimator
            else [saved.model, loaded.model]
        )
        assert params == again
        assert_same_state(*models)
        assert models[1].optimizer.iterations.numpy() == 2
    assert loaded.history == {"loss": [1.0], "f1": [[1.0, 1.0]]}
    with pytest.raises(ConfigError, match="exists"):
        transformer.save(path)
    with pytest.raises(ConfigError, match="AllReduceTransformer, not a AllReduceEstimator"):
        AllReduceEstimator.load(path)


def test_what_cannot_be_written_is_said(spark: SparkSession, tmp_path: Path) -> None:
    estimator = AllReduceEstimator(model=trained(), callbacks=[keras.callbacks.TerminateOnNaN()])
    with pytest.warns(UserWarning, match="callbacks cannot be written"):
        estimator.save(str(tmp_path / "estimator"))
    assert AllReduceEstimator.load(str(tmp_path / "estimator")).getCallbacks() == []
    with pytest.raises(ConfigError, match="no model to save"):
        AllReduceEstimator().save(str(tmp_path / "nothing"))
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(ConfigError, match="no model to save"):
        AllReduceEstimator().write().overwrite().save(str(tmp_path / "estimator"))
    assert AllReduceEstimator.load(str(tmp_path / "estimator")).uid == estimator.uid  # what was there still is


class Exploding:
    def __reduce__(self) -> Any:
        return print, ("the pickle was loaded",)


def with_lambda(folder: Path) -> None:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Lambda(lambda x: x + 1)])
    model.save(folder / "model.keras")


class Unregistered(keras.layers.Layer):
    pass


def with_unregistered(folder: Path) -> None:
    keras.Sequential([keras.Input((2,)), Unregistered()]).save(folder / "model.keras")


def of_a_newer_version(folder: Path) -> None:
    (file,) = (folder / "metadata").glob("part-*")
    metadata = json.loads(file.read_text())
    metadata["allreduceSpark"]["formatVersion"] = 99
    for checksum in (folder / "metadata").glob(".*.crc"):
        checksum.unlink()
    file.write_text(json.dumps(metadata))


def cut_off(folder: Path) -> None:
    content = (folder / "model.keras").read_bytes()
    (folder / "model.keras").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_off, ["model.keras'", "damaged"]),
        (lambda folder: (folder / "model.keras").write_bytes(pickle.dumps(Exploding())), ["pickle", "not loaded"]),
        (lambda folder: (folder / "model.keras").write_bytes(b"hello"), ["no Keras model file"]),
        (lambda folder: (folder / "model.keras").unlink(), ["model.keras' is missing", "not complete"]),
        (of_a_newer_version, ["newer version", "99", "update"]),
        (with_lambda, ["Lambda", "enable_unsafe_deserialization"]),
        (with_unregistered, ["Unregistered", "register_keras_serializable"]),
    ],
)
def test_what_cannot_be_loaded_is_refused(
    spark: SparkSession,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    damage: Callable[[Path], Any],
    words: list[str],
) -> None:
    AllReduceTransformer(trained()).save(str(tmp_path / "saved"))
    (tmp_path / "saved" / ".model.keras.crc").unlink(missing_ok=True)
    damage(tmp_path / "saved")
    with pytest.raises(ConfigError) as caught:
        AllReduceTransformer.load(str(tmp_path / "saved"))
    for word in words:
        assert word in str(caught.value)
    assert "the pickle was loaded" not in capfd.readouterr().out
