"""What goes into a model and comes out of it, and what that means for columns: without Spark, without running the model."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from allreduce_spark.data.forms import ArrayForm
from allreduce_spark.errors import ConfigError
from allreduce_spark.training.models.heads import heads_of, label_forms
from allreduce_spark.training.models.layout import feature_forms, inputs_of, layer_model, outputs_of


class Own(keras.Model):
    def __init__(self, **outputs: int) -> None:
        super().__init__()
        self.parts = {name: keras.layers.Dense(units) for name, units in outputs.items()}

    def call(self, x):
        outputs = {name: layer(x) for name, layer in self.parts.items()}
        return outputs if len(outputs) > 1 else next(iter(outputs.values()))


def compiled(loss, shape=(3,), **arguments):
    model = keras.Sequential([keras.Input(shape), keras.layers.Dense(4, **arguments)])
    model.compile("sgd", loss)
    return model


def test_inputs_and_outputs_of_models_of_every_kind():
    a, b = keras.Input((2,), name="a"), keras.Input((), name="b", dtype="int32")
    joined = keras.layers.Concatenate()([a, keras.layers.Reshape((1,))(b)])
    listed = keras.Model([b, a], [keras.layers.Dense(1, name="z")(joined), keras.layers.Dense(2, name="y")(joined)])
    named = keras.Model({"one": b, "two": a}, {"z": listed.outputs[0]})
    assert [(slot.name, slot.shape, slot.dtype) for slot in inputs_of(listed)] == [
        ("b", (), "int32"),
        ("a", (2,), "float32"),
    ]
    assert [slot.name for slot in inputs_of(named)] == ["one", "two"]
    assert [(slot.name, slot.shape) for slot in outputs_of(listed)] == [("z", (1,)), ("y", (2,))]
    assert [(slot.name, slot.shape) for slot in outputs_of(named)] == [("", (1,))]

    own = Own(z=1, y=2)
    assert (inputs_of(own), outputs_of(own)) == (None, None)
    own(np.ones((2, 5)))
    assert [slot.shape for slot in inputs_of(own)] == [(5,)]
    assert [(slot.name, slot.shape) for slot in outputs_of(own)] == [("z", (1,)), ("y", (2,))]


def test_a_layer_that_was_used_elsewhere_before_is_found_in_this_model():
    layer = keras.layers.Dense(2, name="shared")
    keras.Sequential([keras.Input((3,)), layer])
    inputs = keras.Input((3,))
    model = keras.Model(inputs, keras.layers.Dense(1)(layer(inputs)))
    x = np.ones((4, 3), "float32")
    np.testing.assert_allclose(layer_model(model, "shared").predict(x, verbose=0), layer(x))


def test_features_of_a_model_whose_inputs_are_not_known():
    own = Own(z=1)
    assert feature_forms(own, ["f", "g"], {"f", "g"}) == (ArrayForm("", ("f", "g")),)
    assert feature_forms(own, ["f", "g"], {"f"}) == (ArrayForm("f", ("f",)), ArrayForm("g", ("g",)))
    with pytest.raises(ConfigError, match="not known before it runs"):
        heads_of(own, "auto")


@pytest.mark.parametrize(
    ("loss", "arguments", "kind", "from_logits"),
    [
        ("sparse_categorical_crossentropy", {}, "classes", False),
        (keras.losses.CategoricalFocalCrossentropy(from_logits=True), {}, "classes", True),
        (keras.losses.binary_crossentropy, {}, "labels", False),
        ("binary_crossentropy", {"activation": "softmax"}, "classes", False),
        (keras.losses.BinaryFocalCrossentropy(from_logits=True), {}, "labels", True),
        ("mse", {"activation": "softmax"}, "value", False),
        ("hinge", {"activation": "sigmoid"}, "value", False),
        (lambda y, p: y - p, {"activation": "softmax"}, "classes", False),
        (lambda y, p: y - p, {"activation": "sigmoid"}, "labels", False),
        (lambda y, p: y - p, {}, "value", False),
    ],
)
def test_what_an_output_means(loss, arguments, kind, from_logits):
    (head,) = heads_of(compiled(loss, **arguments), "auto")
    assert (head.kind, head.from_logits) == (kind, from_logits)


def test_a_list_of_losses_meets_the_outputs_in_the_order_that_keras_gives_them():
    inputs = keras.Input((3,))
    z, a = keras.layers.Dense(2, name="z")(inputs), keras.layers.Dense(1, name="a")(inputs)
    x, y = np.zeros((2, 3)), {"z": np.zeros(2), "a": np.ones((2, 1))}
    own = Own(z=2, a=1)
    own(x)
    for model in (keras.Model(inputs, {"z": z, "a": a}), own):
        model.compile("sgd", ["mse", "sparse_categorical_crossentropy"])  # Keras sorts the keys of a dict
        assert np.isfinite(model.evaluate(x, y, verbose=0))[0]
        assert {head.name: head.kind for head in heads_of(model, "auto")} == {"z": "classes", "a": "value"}
    listed = keras.Model(inputs, [z, a])
    listed.compile("sgd", ["sparse_categorical_crossentropy", "mse"])
    assert {head.name: head.kind for head in heads_of(listed, "auto")} == {"z": "classes", "a": "value"}


def test_probabilities_and_classes_along_the_last_axis():
    (head,) = heads_of(compiled(keras.losses.SparseCategoricalCrossentropy(from_logits=True), shape=(2, 3)), "auto")
    logits = np.random.default_rng(0).normal(scale=300, size=(5, 2, 4)).astype("float32")
    expected = keras.ops.convert_to_numpy(keras.ops.softmax(logits))
    np.testing.assert_allclose(head.probability(logits), expected, atol=1e-6)
    np.testing.assert_array_equal(head.prediction(logits), logits.argmax(axis=-1))
    assert not head.is_number
    (head,) = heads_of(compiled(keras.losses.BinaryCrossentropy(from_logits=True)), "auto")
    expected = keras.ops.convert_to_numpy(keras.ops.sigmoid(logits))
    with np.errstate(all="raise", under="ignore"):
        np.testing.assert_allclose(head.probability(logits), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "scalar", "expected"),
    [
        ("sparse_categorical_crossentropy", True, {"shape": (), "limits": (0, 3), "whole": True}),
        (keras.losses.SparseCategoricalCrossentropy(ignore_class=-1), True, {}),
        ("categorical_crossentropy", True, {"shape": (), "limits": (0, 3), "whole": True, "one_hot": 4}),
        ("categorical_crossentropy", False, {"shape": (4,), "limits": (0, 1)}),
        ("binary_crossentropy", False, {"shape": (4,), "limits": (0, 1)}),
        ("mae", False, {"shape": (4,)}),
        (lambda y, p: y - p, False, {}),
    ],
)
def test_what_labels_must_be(loss, scalar, expected):
    (form,) = label_forms(heads_of(compiled(loss), "auto"), ["l"], {"l"} if scalar else set())
    found = {name: getattr(form, name) for name in ("shape", "limits", "whole", "one_hot")}
    assert found == {"shape": None, "limits": None, "whole": False, "one_hot": 0, **expected}
