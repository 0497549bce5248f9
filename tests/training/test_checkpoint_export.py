"""A model out of a checkpoint: as it was trained, with its optimizer's state, and without running code from the files."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest

from allreduce_spark.checkpoint.manifest import Checksum, File, Manifest, share_name
from allreduce_spark.checkpoint.shares import ShareWriter, deal
from allreduce_spark.checkpoint.store import Store
from allreduce_spark.cli.main import main
from allreduce_spark.config import FitConfig
from allreduce_spark.data.spec import LeafSpec, RowSpec
from allreduce_spark.errors import ConfigError
from allreduce_spark.training.identity import fingerprint_of
from allreduce_spark.training.models.checkpoint_export import export_checkpoint
from allreduce_spark.training.models.model_bytes import save_keras

SPEC = RowSpec(x=LeafSpec("x", "float32", (4,)), y=LeafSpec("y", "int64", ()), sample_weight=None)


def make_model(
    *, built: bool = True, layers: tuple[keras.Layer, ...] = (), width: int = 8, dtype: str = "float32"
) -> keras.Model:
    parts = [
        keras.layers.Dense(width, dtype=dtype),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.5),
        *layers,
    ]
    model = keras.Sequential([*([keras.Input((4,))] if built else []), *parts, keras.layers.Dense(3, "softmax")])
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def train(model: keras.Model) -> None:
    draw = np.random.default_rng(0)
    model.fit(draw.normal(size=(64, 4)).astype("float32"), draw.integers(0, 3, 64), epochs=1, batch_size=16, verbose=0)


def save_checkpoint(store: Store, folder: Path, model: keras.Model, archive: File | None, step: int) -> Manifest:
    """What ranks, agents and driver do together, for the state that `model` has."""
    tensors = {f"shared/weights/{index}": weight.numpy() for index, weight in enumerate(model.weights)}
    tensors |= {
        f"shared/optimizer/{index}": np.asarray(value.numpy()) for index, value in enumerate(model.optimizer.variables)
    }
    shares = []
    for rank, names in enumerate(deal({name: array.nbytes for name, array in tensors.items()}, 2)):
        writer = ShareWriter(folder / f"rank{rank}-{step}", rank)
        writer.copy(f"000000-{step:08d}", {name: tensors[name] for name in names}, {"epoch": 0, "step": step})
        saved = writer.finish()
        store.put_share(saved.path, f"000000-{step:08d}", rank, 0)
        shares.append(File(share_name(rank, 0), saved.bytes, saved.checksum))
    fingerprint = fingerprint_of(model, FitConfig(), [], data_schema=SPEC.to_json(), rows=(32, 32), validation_rows=0)
    manifest = Manifest(0, step, 1, 2, tuple(shares), archive, 1e9, fingerprint.to_json(), {"val_loss": 0.25})
    store.commit(manifest)
    return manifest


def fill(tmp_path: Path, model: keras.Model) -> Store:
    """A store with one checkpoint of `model` after some training."""
    store = Store(tmp_path / "fit")
    local = tmp_path / "untrained.keras"
    save_keras(model, local)
    archive = store.put_model(local)
    train(model)
    save_checkpoint(store, tmp_path, model, archive, 4)
    return store


def same_state(left: keras.Model, right: keras.Model) -> bool:
    pairs = zip([*left.weights, *left.optimizer.variables], [*right.weights, *right.optimizer.variables], strict=True)
    return all(np.asarray(a.numpy()).tobytes() == np.asarray(b.numpy()).tobytes() for a, b in pairs)


@pytest.mark.parametrize(
    "model",
    [make_model, lambda: make_model(built=False), lambda: make_model(dtype="bfloat16")],
    ids=["built", "not built before the fit", "bfloat16"],
)
def test_the_exported_model_is_the_trained_one_to_the_bit(tmp_path, model, capsys):
    trained = model()
    store = fill(tmp_path, trained)
    assert main(["checkpoints", "export", store.path, str(tmp_path / "out" / "trained.keras")]) == 0
    assert "checkpoint 000000-00000004 of" in capsys.readouterr().out
    exported = keras.saving.load_model(tmp_path / "out" / "trained.keras")
    assert same_state(exported, trained)
    assert int(exported.optimizer.iterations) == 4
    x = np.ones((2, 4), np.float32)
    np.testing.assert_array_equal(exported.predict(x, verbose=0), trained.predict(x, verbose=0))


def test_a_checkpoint_is_chosen_by_its_id_or_is_the_newest_that_is_whole(tmp_path, capsys):
    model = make_model()
    store = fill(tmp_path, model)
    archive = store.checkpoints()[0].model
    early = [np.array(weight.numpy()) for weight in model.weights]
    train(model)
    later = save_checkpoint(store, tmp_path, model, archive, 8)
    out = tmp_path / "chosen.keras"
    assert main(["checkpoints", "export", store.path, str(out), "--id", "000000-00000004"]) == 0
    for weight, expected in zip(keras.saving.load_model(out).weights, early, strict=True):
        np.testing.assert_array_equal(weight.numpy(), expected)
    assert main(["checkpoints", "export", store.path, str(out)]) == 1
    assert "exists already; pass overwrite=True" in capsys.readouterr().err
    assert export_checkpoint(store, out, overwrite=True) == later
    assert same_state(keras.saving.load_model(out), model)

    share = Path(store.share_place(later.id, 1, 0))
    content = share.read_bytes()
    share.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert export_checkpoint(store, out, overwrite=True).step == 4
    with pytest.raises(ConfigError, match=r"cannot be exported: share-1-0.safetensors is not as it was written"):
        export_checkpoint(store, out, checkpoint=later.id, overwrite=True)
    with pytest.raises(ConfigError, match=r"cannot be exported: it has no manifest.json"):
        export_checkpoint(store, out, checkpoint="000009-00000000", overwrite=True)


def test_code_in_the_archive_is_refused_unless_the_user_says_so(tmp_path, capsys):
    model = make_model(layers=(keras.layers.Lambda(lambda x: x * 2),))
    store = fill(tmp_path, model)
    out = str(tmp_path / "lambda.keras")
    assert main(["checkpoints", "export", store.path, out]) == 1
    assert "A Lambda layer is Python bytecode in the file" in capsys.readouterr().err
    assert not Path(out).exists()
    assert main(["checkpoints", "export", store.path, out, "--unsafe"]) == 0
    assert same_state(keras.saving.load_model(out, safe_mode=False), model)


def test_shares_that_are_no_safetensors_are_never_loaded(tmp_path):
    store = fill(tmp_path, make_model())
    (manifest,) = store.checkpoints()
    content = b"\x80\x04 a pickle"
    Path(store.share_place(manifest.id, 0, 0)).write_bytes(content)
    share = File(share_name(0, 0), len(content), Checksum(content).hexdigest())
    store.commit(Manifest(**{**vars(manifest), "shares": (share, manifest.shares[1])}))
    with pytest.raises(ConfigError, match="it is a pickle"):
        export_checkpoint(store, tmp_path / "out.keras")


def test_the_numbers_of_another_model_are_refused(tmp_path):
    store = fill(tmp_path, make_model())
    archive = store.checkpoints()[0].model
    other = make_model(layers=(keras.layers.Dense(5),))
    train(other)
    save_checkpoint(store, tmp_path, other, archive, 8)
    with pytest.raises(ConfigError, match="it has 10 weights variables, where the model has 8"):
        export_checkpoint(store, tmp_path / "out.keras")
    wider = make_model(width=9)
    train(wider)
    save_checkpoint(store, tmp_path, wider, archive, 12)
    with pytest.raises(ConfigError, match=r"has shape \(4, 8\), but was saved as \(4, 9\)"):
        export_checkpoint(store, tmp_path / "out.keras")


def test_what_cannot_be_exported_is_said_before_anything_is_loaded(tmp_path):
    store = fill(tmp_path, make_model())
    with pytest.raises(ConfigError, match=r"must end in \.keras, got .*out\.h5"):
        export_checkpoint(store, tmp_path / "out.h5")
    with pytest.raises(ConfigError, match="holds no complete checkpoint"):
        export_checkpoint(Store(tmp_path / "empty"), tmp_path / "out.keras")
    (manifest,) = store.checkpoints()
    store.commit(Manifest(**{**vars(manifest), "model": None}))
    with pytest.raises(ConfigError, match="alone, without a model for them"):
        export_checkpoint(store, tmp_path / "out.keras")


def test_the_module_with_the_models_own_classes_is_imported_on_request(tmp_path, monkeypatch, capsys):
    @keras.saving.register_keras_serializable(package="test_export")
    class Twice(keras.layers.Layer):
        def call(self, x):
            return x * 2

    model = make_model(layers=(Twice(),))
    store = fill(tmp_path, model)
    monkeypatch.setitem(keras.saving.get_custom_objects(), "test_export>Twice", None)
    keras.saving.get_custom_objects().pop("test_export>Twice")
    (tmp_path / "own_layers_of_export.py").write_text(
        "import keras\n"
        "@keras.saving.register_keras_serializable(package='test_export')\n"
        "class Twice(keras.layers.Layer):\n"
        "    def call(self, x):\n"
        "        return x * 2\n"
    )
    out = str(tmp_path / "own.keras")
    assert main(["checkpoints", "export", store.path, out]) == 1
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["checkpoints", "export", store.path, out, "--import", "no_such_module_at_all"]) == 1
    assert "--import no_such_module_at_all" in capsys.readouterr().err
    assert main(["checkpoints", "export", store.path, out, "--import", "own_layers_of_export"]) == 0
    assert same_state(keras.saving.load_model(out), model)
