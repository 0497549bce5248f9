"""The driver's coordinator: a checkpoint exists when all shares are there, and ranks go on from the newest that all have."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from allreduce_spark.checkpoint.coordinator import Coordinator
from allreduce_spark.checkpoint.fingerprint import Fingerprint
from allreduce_spark.checkpoint.manifest import Checksum, checkpoint_id, share_name
from allreduce_spark.checkpoint.store import Store
from allreduce_spark.config import Checkpoint
from allreduce_spark.errors import ConfigError

FINGERPRINT = Fingerprint(
    model="digest",
    layers=2,
    parameters=10,
    optimizer="{}",
    loss="{}",
    metrics="{}",
    callbacks=(),
    data_schema="schema",
    rows=(5, 6),
    validation_rows=0,
    seed=1,
    shuffle=True,
    global_batch_size=8,
    class_weight="null",
    sync_every=1,
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def begun(store: Store | None, num_ranks: int = 2, **settings: Any) -> Coordinator:
    coordinator = Coordinator(Checkpoint(None if store is None else store.path, **settings), store)
    coordinator.begin(FINGERPRINT)
    coordinator.resume([()] * num_ranks)
    return coordinator


def bring(store: Store, tmp_path: Path, step: int, rank: int, launch: int = 0) -> dict[str, Any]:
    """Put a share into the store, as an agent does; returns what it then tells the driver."""
    local = tmp_path / f"share-{rank}"
    local.write_bytes(os.urandom(100 + rank))
    id_ = checkpoint_id(0, step)
    store.put_share(local, id_, rank, launch)
    content = local.read_bytes()
    about = {"id": id_, "epoch": 0, "step": step, "logs": {}, "bytes": len(content)}
    return {**about, "name": share_name(rank, launch), "checksum": Checksum(content).hexdigest()}


def test_a_checkpoint_exists_once_the_last_share_is_there(store, tmp_path):
    coordinator = begun(store)
    coordinator.note(1, bring(store, tmp_path, 5, 1))
    coordinator.fall_back()
    assert coordinator.newest is None
    coordinator.note(0, bring(store, tmp_path, 5, 0))
    coordinator.close()
    (manifest,) = store.checkpoints()
    assert store.verify(manifest.id) == []
    assert (manifest.step, manifest.number, manifest.num_shards) == (5, 1, 2)
    assert Fingerprint.from_json(manifest.fingerprint) == FINGERPRINT


def test_what_one_rank_could_not_save_is_given_up_with_a_warning_and_the_next_one_counts(store, tmp_path, caplog):
    coordinator = begun(store)
    coordinator.note(0, bring(store, tmp_path, 5, 0))
    coordinator.note(1, {"id": checkpoint_id(0, 5), "cause": "No space left on device"})
    for rank in (0, 1):
        coordinator.note(rank, bring(store, tmp_path, 9, rank))
    coordinator.close()
    assert [manifest.step for manifest in store.checkpoints()] == [9]
    assert "No space left on device" in caplog.text


def test_older_ones_are_removed_as_the_settings_say(store, tmp_path):
    coordinator = begun(store, keep=2)
    for step in (1, 2, 3, 4):
        for rank in (0, 1):
            coordinator.note(rank, bring(store, tmp_path, step, rank))
    coordinator.close()
    assert [(manifest.step, manifest.number) for manifest in store.checkpoints()] == [(3, 3), (4, 4)]


def test_ranks_go_on_from_the_newest_that_all_of_them_have_on_their_disks(store):
    coordinator = begun(None)
    assert coordinator.resume([{"a", "b"}, {"a"}]) == {"id": "a"}
    assert coordinator.resume([{"a", "b"}, {"a", "b"}]) == {"id": "b"}
    assert coordinator.resume([{"a"}, {"b"}]) is None
    coordinator.close()


def test_a_checkpoint_from_which_ranks_fail_again_and_again_gives_way_to_the_one_before():
    coordinator = begun(None)
    disks = [{"a", "b"}, {"a", "b"}]
    assert [coordinator.resume(disks) for _ in range(5)] == [{"id": "b"}] * 2 + [{"id": "a"}] * 2 + [None]
    coordinator.note(0, {"id": "c"})  # the ranks have come on
    assert coordinator.resume(disks) == {"id": "b"}
    coordinator.close()


def test_ranks_without_anything_on_their_disks_go_on_from_the_store(store, tmp_path):
    coordinator = begun(store)
    for rank in (0, 1):
        coordinator.note(rank, bring(store, tmp_path, 5, rank))
    coordinator.fall_back()
    places = {index: store.place(checkpoint_id(0, 5), share_name(index, 0)) for index in (0, 1)}
    assert coordinator.resume([()]) == {"id": checkpoint_id(0, 5), "shares": places}
    older, newer = checkpoint_id(0, 4), checkpoint_id(0, 6)
    assert coordinator.resume([{older}])["id"] == checkpoint_id(0, 5)
    assert coordinator.resume([{older, newer}]) == {"id": newer}
    coordinator.close()


def test_shares_of_a_generation_that_is_over_do_not_complete_a_checkpoint(store, tmp_path):
    coordinator = begun(store)
    coordinator.note(0, bring(store, tmp_path, 5, 0, launch=0))
    coordinator.resume([(), ()])
    coordinator.note(1, bring(store, tmp_path, 5, 1, launch=1))
    coordinator.fall_back()
    assert coordinator.newest is None
    coordinator.note(0, bring(store, tmp_path, 5, 0, launch=1))
    coordinator.close()
    assert [share.name for share in store.checkpoints()[0].shares] == [share_name(0, 1), share_name(1, 1)]


def test_a_store_that_fails_costs_a_warning_and_not_the_training(store, tmp_path, caplog):
    coordinator = begun(store)
    for rank in (0, 1):
        fields = bring(store, tmp_path, 5, rank)
        coordinator.note(rank, {**fields, "bytes": fields["bytes"] + 1})
    coordinator.fall_back()
    assert coordinator.newest is None
    assert "Training goes on" in caplog.text
    coordinator.close()


def test_a_store_that_hangs_is_waited_for_until_its_time_is_over(store, tmp_path, monkeypatch, caplog):
    answers = threading.Event()
    monkeypatch.setattr(store, "commit", lambda manifest: answers.wait(30))
    coordinator = Coordinator(Checkpoint(store.path), store, timeout_s=0.2)
    coordinator.begin(FINGERPRINT)
    coordinator.resume([(), ()])
    for rank in (0, 1):
        coordinator.note(rank, bring(store, tmp_path, 5, rank))
    with pytest.raises(ConfigError, match=r"has not answered for 0.2 s. Setting: Timeouts.checkpoint_s"):
        coordinator.fall_back()
    coordinator.close()
    assert "within 0.2 s, and may be missing there. Setting: Timeouts.checkpoint_s" in caplog.text
    answers.set()


def test_a_damaged_newest_checkpoint_is_passed_over_before_another_stage(store, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    coordinator = begun(store)
    for step in (5, 6):
        for rank in (0, 1):
            coordinator.note(rank, bring(store, tmp_path, step, rank))
    coordinator.fall_back()
    assert coordinator.newest.step == 6
    Path(store.place(checkpoint_id(0, 6), share_name(1, 0))).write_bytes(b"x" * 101)
    coordinator.fall_back()
    assert coordinator.newest.step == 5
    assert "falling back to the one before" in caplog.text
    coordinator.close()


def test_numbers_go_on_where_a_fit_is_resumed(store, tmp_path):
    first = begun(store)
    for rank in (0, 1):
        first.note(rank, bring(store, tmp_path, 5, rank))
    first.close()
    resumed = dataclasses.replace(store.checkpoints()[0], number=7)
    second = Coordinator(Checkpoint(store.path), store, resumed=resumed)
    second.resume([(), ()])
    for rank in (0, 1):
        second.note(rank, bring(store, tmp_path, 6, rank))
    second.close()
    assert [manifest.number for manifest in store.checkpoints()] == [1, 8]


def test_damaged_ones_that_are_later_are_forgotten_once_the_fit_may_go_on(store, tmp_path):
    first = begun(store)
    for step in (5, 6):
        for rank in (0, 1):
            first.note(rank, bring(store, tmp_path, step, rank))
    first.close()
    second = Coordinator(Checkpoint(store.path), store, resumed=store.checkpoints()[0])
    assert [manifest.step for manifest in store.checkpoints()] == [5, 6]
    second.begin(FINGERPRINT)
    assert [manifest.step for manifest in store.checkpoints()] == [5]
    second.close()
