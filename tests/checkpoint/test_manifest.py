"""Manifests on their way through JSON, and which checkpoints are kept."""

from __future__ import annotations

import json

import pytest

from allreduce_spark.checkpoint.manifest import File, Manifest, checkpoint_id, is_checkpoint_id, kept
from allreduce_spark.config import Checkpoint
from allreduce_spark.errors import CheckpointError, ConfigError


def manifest(number: int, size: int = 10, **logs: float) -> Manifest:
    """The `number`-th checkpoint of a fit, at the border of an epoch."""
    shares = tuple(File(f"share-{rank}-0.safetensors", size // 2, "0" * 32) for rank in range(2))
    return Manifest(number, 0, number, 4, shares, None, saved_at=float(number), logs=logs)


def kept_numbers(manifests: list[Manifest], settings: Checkpoint) -> dict[int, str]:
    reasons = kept(manifests, settings)
    return {manifest.number: reasons[manifest.id] for manifest in manifests if manifest.id in reasons}


def test_a_manifest_comes_back_from_json_as_it_was():
    whole = Manifest(
        epoch=3,
        step=250,
        number=7,
        num_shards=4,
        shares=(File("share-0-2.safetensors", 5, "a" * 32), File("share-1-2.safetensors", 6, "b" * 32)),
        model=File("model.keras", 7, "c" * 32),
        saved_at=1.5e9,
        fingerprint={"seed": 1},
        logs={"loss": float("nan"), "f1": [0.5, 0.25]},
        settings=Checkpoint(path="s3://bucket/fit", every_s=60, keep_best="f1"),
    )
    fields = json.loads(json.dumps(whole.to_json()))
    assert json.dumps(Manifest.from_json(fields).to_json()) == json.dumps(whole.to_json())
    assert (whole.id, whole.bytes) == ("000003-00000250", 11)


@pytest.mark.parametrize(
    "fields", [None, [], {}, {"format": "of another library"}, {**manifest(1).to_json(), "shares": 3}]
)
def test_what_is_no_manifest_is_an_error_that_says_so(fields):
    with pytest.raises(CheckpointError, match="the manifest is"):
        Manifest.from_json(fields)


def test_ids_sort_in_the_order_of_training():
    positions = [(0, 1), (0, 9), (0, 10), (1, 0), (9, 999), (10, 0)]
    ids = [checkpoint_id(*position) for position in positions]
    assert ids == sorted(ids)
    assert all(map(is_checkpoint_id, ids))
    assert not any(map(is_checkpoint_id, ["model.keras", "000001", "000001-00000002.old", ""]))


def test_the_last_ones_are_kept():
    manifests = [manifest(number) for number in range(1, 6)]
    assert kept_numbers(manifests, Checkpoint(keep=2)) == {4: "last 2", 5: "newest, last 2"}
    assert kept_numbers(manifests[:1], Checkpoint()) == {1: "newest, last 3"}
    assert kept_numbers([], Checkpoint()) == {}


def test_every_so_manieth_is_kept_for_ever_whatever_was_removed_in_between():
    settings, there = Checkpoint(keep=1, keep_every=3), []
    for number in range(1, 12):
        there = [*there, manifest(number)]
        reasons = kept(there, settings)
        there = [manifest for manifest in there if manifest.id in reasons]
    assert [manifest.number for manifest in there] == [3, 6, 9, 11]


@pytest.mark.parametrize(
    ("name", "mode", "best"),
    [
        ("val_loss", "auto", 2),
        ("val_accuracy", "auto", 3),
        ("val_accuracy", "min", 1),
        ("val_loss", "max", 3),
        ("mean_absolute_error", "auto", 2),
        ("AUC", "auto", 3),
    ],
)
def test_the_best_is_kept_by_the_direction_of_its_metric(name, mode, best):
    values = {1: 0.2, 2: 0.1, 3: 0.9, 4: float("nan"), 5: 0.5}
    if mode == "min":
        values[1] = 0.05
    manifests = [manifest(number, **{name: value}) for number, value in values.items()]
    assert kept_numbers(manifests, Checkpoint(keep=1, keep_best=name, best_mode=mode)) == {
        best: f"best {name}",
        5: "newest, last 1",
    }


def test_of_equally_good_ones_the_first_stays_as_in_keras():
    manifests = [manifest(number, val_loss=1.0) for number in (1, 2, 3)]
    assert list(kept_numbers(manifests, Checkpoint(keep=1, keep_best="val_loss"))) == [1, 3]


def test_without_the_metric_there_is_no_best():
    assert list(kept_numbers([manifest(1), manifest(2)], Checkpoint(keep=1, keep_best="val_loss"))) == [2]


def test_a_quota_is_spent_on_the_newest_then_the_best_then_the_last_ones():
    manifests = [manifest(number, loss=abs(number - 2)) for number in range(1, 7)]
    settings = {"keep": 3, "keep_every": 1, "keep_best": "loss"}
    sizes = {5: [6], 10: [6], 20: [2, 6], 35: [2, 5, 6], 45: [2, 4, 5, 6], 55: [2, 3, 4, 5, 6], 60: [1, 2, 3, 4, 5, 6]}
    for max_bytes, numbers in sizes.items():
        assert list(kept_numbers(manifests, Checkpoint(**settings, max_bytes=max_bytes))) == numbers


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"path": ""}, "Checkpoint.path"),
        ({"every_steps": 0}, "Checkpoint.every_steps must be at least 1"),
        ({"every_s": float("inf")}, "Checkpoint.every_s must be a positive number of seconds"),
        ({"every_s": True}, "Checkpoint.every_s must be"),
        ({"every_s": 60, "every_steps": 100}, "one of every_steps and every_s"),
        ({"keep": 0}, "Checkpoint.keep must be at least 1"),
        ({"keep_every": 1.5}, "Checkpoint.keep_every must be an integer"),
        ({"keep_best": ""}, "Checkpoint.keep_best"),
        ({"best_mode": "largest"}, "'auto', 'min' or 'max', got 'largest'"),
        ({"max_bytes": -1}, "Checkpoint.max_bytes must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        Checkpoint(**settings)
