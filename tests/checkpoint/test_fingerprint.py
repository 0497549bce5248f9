"""Whether a fit may go on from a checkpoint, and how a user is told."""

from __future__ import annotations

import dataclasses
import json

import pytest

from allreduce_spark.checkpoint.fingerprint import Fingerprint, differences
from allreduce_spark.errors import CheckpointError

ADAM = json.dumps({"class_name": "Adam", "config": {"learning_rate": 0.001, "beta_1": 0.9}})
SAVED = Fingerprint(
    model="0123456789abcdef",
    layers=25,
    parameters=1234567,
    optimizer=ADAM,
    loss='{"loss": "mse"}',
    metrics='{"metrics": ["mae"]}',
    callbacks=("EarlyStopping",),
    data_schema='{"x": "float32 [784]"}',
    rows=(100, 101, 99),
    validation_rows=30,
    seed=1,
    shuffle=True,
    global_batch_size=96,
    class_weight="null",
    sync_every=1,
)


def test_a_fingerprint_comes_back_from_json_as_it_was():
    assert Fingerprint.from_json(json.loads(json.dumps(SAVED.to_json()))) == SAVED
    with pytest.raises(CheckpointError, match="cannot be understood"):
        Fingerprint.from_json({})


def test_the_same_fit_has_no_differences():
    assert differences(SAVED, dataclasses.replace(SAVED), mid_epoch=True) == []


@pytest.mark.parametrize(
    ("changed", "text", "forbids_within", "forbids_between"),
    [
        (
            {"model": "fedcba9876543210", "layers": 24, "parameters": 1000},
            "the model: saved with 25 layers and 1,234,567 parameters (architecture 0123456789ab), now 24 layers and 1,000 "
            "parameters (architecture fedcba987654)",
            True,
            True,
        ),
        (
            {"optimizer": json.dumps({"class_name": "SGD", "config": {}})},
            "the optimizer: saved with Adam, now SGD",
            True,
            True,
        ),
        (
            {"optimizer": json.dumps({"class_name": "Adam", "config": {"learning_rate": 0.01, "beta_1": 0.9}})},
            "the optimizer's learning_rate: saved with 0.001, now 0.01",
            False,
            False,
        ),
        ({"data_schema": "{}"}, """the data: saved with rows of {"x": "float32 [784]"}, now {}""", True, True),
        (
            {"rows": (300,)},
            "the rows: saved with 300 in 3 shards (100, 101, 99), now 300 in one shard (300)",
            True,
            False,
        ),
        ({"seed": 2}, "the seed: saved with 1, now 2", True, False),
        ({"shuffle": False}, "shuffle: saved with True, now False", True, False),
        ({"global_batch_size": 64}, "the global batch size: saved with 96, now 64", True, False),
        ({"metrics": "{}"}, """the metrics: saved with {"metrics": ["mae"]}, now {}""", True, False),
        ({"loss": '{"loss": "mae"}'}, """the loss: saved with {"loss": "mse"}, now {"loss": "mae"}""", False, False),
        ({"class_weight": "[[0, 2.0]]"}, "class_weight: saved with null, now [[0, 2.0]]", False, False),
        ({"validation_rows": 0}, "the rows to validate on: saved with 30, now 0", False, False),
        (
            {"callbacks": ()},
            "the callbacks: saved with ['EarlyStopping'], now []; where the class has changed, it starts anew",
            False,
            False,
        ),
        ({"sync_every": "epoch"}, "sync_every: saved with 1, now epoch", False, False),
    ],
)
def test_a_difference_is_named_with_both_values(changed, text, forbids_within, forbids_between):
    now = dataclasses.replace(SAVED, **changed)
    for mid_epoch, forbids in ((True, forbids_within), (False, forbids_between)):
        (difference,) = differences(SAVED, now, mid_epoch=mid_epoch)
        assert (difference.text, difference.forbids) == (text, forbids)


def test_what_forbids_to_go_on_comes_first():
    now = dataclasses.replace(SAVED, sync_every=4, seed=2, data_schema="{}")
    assert [difference.forbids for difference in differences(SAVED, now, mid_epoch=False)] == [True, False, False]
