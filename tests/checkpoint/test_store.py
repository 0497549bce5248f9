"""The store: what is complete is found and verified, what is not does not exist, what is damaged is passed over."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
from pathlib import Path

import pytest
from pyarrow import fs

from allreduce_spark.checkpoint import files
from allreduce_spark.checkpoint.manifest import Checksum, File, Manifest, share_name
from allreduce_spark.checkpoint.store import Store
from allreduce_spark.config import Checkpoint
from allreduce_spark.errors import CheckpointError, ConfigError


def put_shares(store: Store, tmp_path: Path, step: int, world_size: int = 2, launch: int = 0) -> Manifest:
    """What the ranks of a fit do for a checkpoint; returns the manifest that the driver would commit."""
    shares = []
    for index in range(world_size):
        local = tmp_path / "local"
        local.write_bytes(os.urandom(100 + step + index))
        store.put_share(local, f"000000-{step:08d}", index, launch)
        content = local.read_bytes()
        shares.append(File(share_name(index, launch), len(content), Checksum(content).hexdigest()))
    return Manifest(0, step, step, world_size, tuple(shares), None, saved_at=1e9 + step)


def fill(store: Store, tmp_path: Path, *steps: int, model: File | None = None) -> list[Manifest]:
    manifests = [dataclasses.replace(put_shares(store, tmp_path, step), model=model) for step in steps]
    for manifest in manifests:
        store.commit(manifest)
    return manifests


def ids(*steps: int) -> list[str]:
    return [f"000000-{step:08d}" for step in steps]


@pytest.fixture(params=["local", "S3"])
def store(request, tmp_path) -> Store:
    """An empty store on the local disk, and one in a bucket."""
    return Store(tmp_path / "fit" if request.param == "local" else request.getfixturevalue("bucket")("fit"))


@pytest.fixture
def local_store(tmp_path) -> Store:
    return Store(tmp_path / "fit")


def damage(store: Store, checkpoint: str, name: str, content: bytes) -> None:
    system, path = (
        fs.FileSystem.from_uri(store.place(checkpoint, name)) if ":" in store.path else (fs.LocalFileSystem(), "")
    )
    with system.open_output_stream(path or store.place(checkpoint, name)) as stream:
        stream.write(content)


def test_a_checkpoint_exists_only_once_its_manifest_is_there(store, tmp_path):
    store.begin(None)
    manifest = put_shares(store, tmp_path, 10)
    assert store.checkpoints() == []
    assert store.latest() is None
    assert store.verify(manifest.id) == ["it has no manifest.json: it was never complete"]
    store.commit(manifest)
    assert store.checkpoints() == [manifest]
    assert store.latest() == manifest
    assert store.verify(manifest.id) == []


def test_checkpoints_are_listed_and_removed(store, tmp_path):
    manifests = fill(store, tmp_path, 30, 10, 20)
    assert [manifest.id for manifest in store.checkpoints()] == ids(10, 20, 30)
    store.remove(manifests[2].id)
    assert [manifest.id for manifest in store.checkpoints()] == ids(10, 30)
    assert {path.partition("/")[0] for path, _ in files.list_files(store.path)} == set(ids(10, 30))
    store.remove("000007-00000000")


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(store, tmp_path, caplog):
    manifests = fill(store, tmp_path, 10, 20, 30, 40, 50)
    content = bytearray(100 + 50)
    damage(store, ids(50)[0], share_name(0, 0), content)
    files.remove(store.share_place(ids(40)[0], 1, 0))
    damage(store, ids(30)[0], share_name(1, 0), b"short")
    damage(store, ids(20)[0], "manifest.json", b'{"format": "allreduce_spark.che')
    with caplog.at_level(logging.WARNING):
        assert store.latest() == manifests[0]
    assert [
        record.getMessage().partition(": ")[2]
        for record in caplog.records
        if record.name == "allreduce_spark.checkpoint.store"
    ] == [
        "checkpoint 000000-00000020 is damaged: manifest.json is damaged: it is not JSON (Unterminated string starting at: "
        "line 1 column 12 (char 11))",
        "checkpoint 000000-00000050 is damaged, falling back to the one before: share-0-0.safetensors is not as it was "
        "written: its checksum is wrong",
        "checkpoint 000000-00000040 is damaged, falling back to the one before: share-1-0.safetensors is missing",
        "checkpoint 000000-00000030 is damaged, falling back to the one before: share-1-0.safetensors has 5 bytes, but was "
        "written with 131",
    ]


def test_a_flipped_bit_anywhere_in_a_manifest_is_no_other_error(local_store, tmp_path):
    (manifest,) = fill(local_store, tmp_path, 10)
    path = Path(local_store.place(manifest.id, "manifest.json"))
    content, outcomes = path.read_bytes(), set()
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x04]) + content[position + 1 :])
        with contextlib.suppress(ConfigError):  # by a newer version
            outcomes.add(type(local_store.verify(manifest.id)))
    assert outcomes == {list}


def test_a_manifest_cannot_name_files_outside_of_its_folder(local_store, tmp_path):
    (manifest,) = fill(local_store, tmp_path, 10)
    path = Path(local_store.place(manifest.id, "manifest.json"))
    fields = json.loads(path.read_text())
    fields["shares"][0]["name"] = "../../secret"
    path.write_text(json.dumps(fields))
    assert local_store.verify(manifest.id) == [
        "the manifest is damaged (ValueError('its fields contradict each other'))"
    ]


def test_a_manifest_in_the_wrong_folder_is_damage(local_store, tmp_path):
    fill(local_store, tmp_path, 10, 20)
    for name in os.listdir(Path(local_store.path) / ids(20)[0]):
        os.replace(local_store.place(ids(20)[0], name), local_store.place(ids(10)[0], name))
    assert local_store.verify(ids(10)[0]) == ["manifest.json is that of 000000-00000020"]


def test_a_checkpoint_of_a_newer_version_is_neither_read_nor_passed_over(local_store, tmp_path):
    (manifest,) = fill(local_store, tmp_path, 10)
    path = Path(local_store.place(manifest.id, "manifest.json"))
    path.write_text(json.dumps({**manifest.to_json(), "version": 2}))
    for look in (local_store.checkpoints, local_store.latest, lambda: local_store.begin(None)):
        with pytest.raises(ConfigError, match=r"written by a newer version of allreduce-spark \(format 2;"):
            look()


def test_shares_that_the_driver_does_not_see_are_no_checkpoint(local_store, tmp_path):
    manifest = put_shares(local_store, tmp_path, 10)
    os.remove(local_store.share_place(manifest.id, 1, 0))
    with pytest.raises(
        CheckpointError, match=r"share-1-0.safetensors' is not there, .* must be one that all hosts share"
    ):
        local_store.commit(manifest)
    Path(local_store.share_place(manifest.id, 1, 0)).write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match="has 7 bytes, not 111"):
        local_store.commit(manifest)
    assert local_store.checkpoints() == []


def test_a_relative_path_is_of_the_process_that_makes_the_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Store("fits/first").path == str(tmp_path / "fits" / "first")
    assert Store("s3://bucket/fit?region=eu-west-1").path == "s3://bucket/fit?region=eu-west-1"


def test_a_late_upload_for_a_rank_that_is_no_more_changes_nothing(store, tmp_path):
    manifest = put_shares(store, tmp_path, 10, world_size=2, launch=1)
    store.commit(manifest)
    put_shares(store, tmp_path, 10, world_size=3, launch=0)
    assert store.latest() == manifest
    store.remove(manifest.id)
    assert [info for info in files.list_files(store.path) if info.path.startswith("000000-")] == []


def test_what_need_not_be_kept_is_removed_and_what_may_be_in_the_making_is_not(store, tmp_path):
    fill(store, tmp_path, 10, 20, 40)
    put_shares(store, tmp_path, 30)  # never became complete, and never will
    put_shares(store, tmp_path, 50)  # on its way
    assert store.prune(Checkpoint(keep=2)) == ids(10, 30)
    survey = store.survey()
    assert [manifest.id for manifest in survey.complete] == ids(20, 40)
    assert survey.incomplete == tuple(ids(50))
    assert store.prune(Checkpoint(keep=2)) == []


def test_the_newest_complete_one_stays_whatever_else_is_there(store, tmp_path):
    put_shares(store, tmp_path, 10)
    assert store.prune(Checkpoint(keep=1)) == []
    fill(store, tmp_path, 20)
    put_shares(store, tmp_path, 30)
    assert store.prune(Checkpoint(keep=1, max_bytes=1)) == ids(10)
    assert [manifest.id for manifest in store.checkpoints()] == ids(20)


def test_a_fit_that_goes_on_leaves_the_folder_as_it_is_until_it_may_and_then_forgets_what_is_later(store, tmp_path):
    fill(store, tmp_path, 10, 20, 30, 40)
    put_shares(store, tmp_path, 5)
    put_shares(store, tmp_path, 50)
    damage(store, ids(30)[0], "manifest.json", b"")
    before = files.list_files(store.path)
    store.begin(ids(20)[0])
    assert files.list_files(store.path) == before
    store.forget_later(ids(20)[0])
    survey = store.survey()
    assert [manifest.id for manifest in survey.complete] == ids(10, 20)
    assert (survey.damaged, list(survey.incomplete)) == ({}, ids(5, 30, 40, 50))
    with pytest.raises(ConfigError, match="holds no complete checkpoint 000000-00000040"):
        store.begin(ids(40)[0])
    fill(store, tmp_path, 45)
    assert sorted(store.prune(Checkpoint(keep=9))) == ids(5, 30, 40)


def test_a_fit_from_its_beginning_never_mixes_with_an_earlier_one(store, tmp_path):
    put_shares(store, tmp_path, 5)
    files.put_file(tmp_path / "local", files.inside(store.path, ".model.keras.0123abcd.partial"), overwrite=False)
    store.begin(None)
    survey = store.survey()
    assert (list(survey.incomplete), survey.partial) == (ids(5), ())
    fill(store, tmp_path, 10)
    with pytest.raises(
        ConfigError, match=r"holds 1 checkpoints already, the newest 000000-00000010\. Pass resume='auto'"
    ):
        store.begin(None)
    assert [manifest.id for manifest in store.checkpoints()] == ids(10)


def test_a_folder_of_other_things_is_left_alone(tmp_path, local_store):
    folder = Path(local_store.path)
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"is no folder of checkpoints: it holds 'thesis.tex'\."):
        local_store.begin(None)
    fill(local_store, tmp_path, 10, 20)
    local_store.begin(ids(20)[0])
    local_store.prune(Checkpoint(keep=1))
    assert (folder / "thesis.tex").read_text() == "years of work"
    with pytest.raises(ConfigError, match="cannot be read"):
        Store(folder / "thesis.tex").begin(None)


def test_the_model_is_put_there_once_for_all_checkpoints_and_verified_with_them(store, tmp_path):
    local = tmp_path / "model.keras"
    local.write_bytes(b"an archive")
    store.begin(None)
    model = store.put_model(local)
    assert model == File("model.keras", 10, Checksum(b"an archive").hexdigest())
    (manifest,) = fill(store, tmp_path, 10, model=model)
    store.begin(manifest.id)
    local.write_bytes(b"the same model at another time")
    assert store.put_model(local) == model
    assert store.latest() == manifest
    files.remove(files.inside(store.path, "model.keras"))
    assert store.verify(manifest.id) == ["model.keras is missing"]


def test_a_store_that_fails_is_one_clear_error_for_those_who_train_on(local_store, tmp_path, monkeypatch):
    manifests = fill(local_store, tmp_path, 10, 20)

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", disk_full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        put_shares(local_store, tmp_path, 30)
    with pytest.raises(CheckpointError, match="No space left on device"):
        local_store.commit(dataclasses.replace(manifests[1], number=7))
    assert local_store.latest() == manifests[1]
    unreachable = Store("s3://models/fit?endpoint_override=127.0.0.1:1&scheme=http&connect_timeout=1")
    monkeypatch.setattr(files, "_locate", lambda place: (_ for _ in ()).throw(ConfigError("cannot be reached")))
    with pytest.raises(CheckpointError, match="cannot be reached"):
        unreachable.prune(Checkpoint())
