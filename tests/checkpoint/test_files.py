"""Whole files on any file system: complete or absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pyarrow import fs

from allreduce_spark.checkpoint import files
from allreduce_spark.checkpoint.files import check_absent, fetch_file, put_file
from allreduce_spark.errors import ConfigError


@pytest.fixture
def local(tmp_path: Path) -> Path:
    path = tmp_path / "made.keras"
    path.write_bytes(os.urandom(1 << 20))
    return path


@pytest.fixture
def memory(monkeypatch):
    """A file system that is not the local one, under mock://: pyarrow's own in-memory file system."""
    system = fs._MockFileSystem()
    monkeypatch.setattr(files, "_locate", lambda place: (system, os.fspath(place).removeprefix("mock://")))
    return system


@pytest.mark.parametrize("form", [str, lambda path: path.as_uri(), lambda path: f"file:{path}", lambda path: path])
def test_a_local_file_is_put_and_fetched_by_path_and_by_uri(tmp_path, local, form):
    place = form(tmp_path / "new" / "folders" / "model.keras")
    put_file(local, place, overwrite=False)
    assert fetch_file(place, tmp_path / "unused") == tmp_path / "new" / "folders" / "model.keras"
    assert fetch_file(place, tmp_path).read_bytes() == local.read_bytes()
    assert os.listdir(tmp_path / "new" / "folders") == ["model.keras"]


def test_a_file_system_that_is_not_known_is_no_folder_of_that_name(tmp_path, local, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"dbfs:/models/model\.keras"):
        put_file(local, "dbfs:/models/model.keras", overwrite=False)
    assert os.listdir(tmp_path) == [local.name]


def test_a_relative_path_is_one_of_the_working_folder(tmp_path, local, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put_file(local, "model.keras", overwrite=False)
    assert (tmp_path / "model.keras").read_bytes() == local.read_bytes()


def test_a_file_elsewhere_is_put_and_fetched(memory, tmp_path, local):
    put_file(local, "mock://bucket/models/model.keras", overwrite=False)
    assert [info.path for info in memory.get_file_info(fs.FileSelector("bucket", recursive=True)) if info.is_file] == [
        "bucket/models/model.keras"
    ]
    copy = fetch_file("mock://bucket/models/model.keras", tmp_path)
    assert copy == tmp_path / "model.keras"
    assert copy.read_bytes() == local.read_bytes()


def test_a_bucket_of_s3_holds_the_file_and_nothing_else(bucket, tmp_path, local):
    with pytest.raises(ConfigError, match="there is no such file"):
        fetch_file(bucket("model.keras"), tmp_path)
    put_file(local, bucket("model.keras"), overwrite=False)
    assert fetch_file(bucket("model.keras"), tmp_path).read_bytes() == local.read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        put_file(local, bucket("model.keras"), overwrite=False)
    local.write_bytes(b"newer")
    put_file(local, bucket("model.keras"), overwrite=True)
    assert fetch_file(bucket("model.keras"), tmp_path).read_bytes() == b"newer"
    system, path = fs.FileSystem.from_uri(bucket("model.keras"))
    assert [info.path for info in system.get_file_info(fs.FileSelector("models", recursive=True)) if info.is_file] == [
        path
    ]


def test_what_nobody_looks_at_yet_gets_its_name_at_once_in_an_object_store(bucket, tmp_path, local, monkeypatch):
    renamed = []
    monkeypatch.setattr(files, "_rename", lambda system, source, path: renamed.append(path))
    put_file(local, bucket("share"), overwrite=True, in_one_step=False)
    assert renamed == []
    assert fetch_file(bucket("share"), tmp_path).read_bytes() == local.read_bytes()
    put_file(local, tmp_path / "share", overwrite=True, in_one_step=False)
    assert renamed == [str(tmp_path / "share")]


@pytest.mark.parametrize(
    ("folder", "place"),
    [
        ("/data/fit/", "/data/fit/a"),
        ("/data/what?", "/data/what?/a"),
        ("s3://bucket/fit?region=x&scheme=http", "s3://bucket/fit/a?region=x&scheme=http"),
        ("file:/data/fit", "file:/data/fit/a"),
    ],
)
def test_a_place_in_a_folder(folder, place):
    assert files.inside(folder, "a") == place


def test_what_exists_is_replaced_only_on_request(tmp_path, local):
    place = tmp_path / "model.keras"
    place.write_bytes(b"precious")
    for refuse in (check_absent, lambda place, overwrite: put_file(local, place, overwrite=overwrite)):
        with pytest.raises(ConfigError, match=r"model.keras' exists already; pass overwrite=True"):
            refuse(place, overwrite=False)
    assert place.read_bytes() == b"precious"
    put_file(local, place, overwrite=True)
    assert place.read_bytes() == local.read_bytes()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_is_never_replaced(tmp_path, local, overwrite):
    with pytest.raises(ConfigError, match="it is a folder"):
        put_file(local, tmp_path, overwrite=overwrite)


def test_what_breaks_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path, local, monkeypatch):
    place = tmp_path / "kept" / "model.keras"
    put_file(local, place, overwrite=False)
    before = place.read_bytes()

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", disk_full)
    with pytest.raises(ConfigError, match=r"kept/model.keras' cannot be written: .*No space left on device"):
        put_file(local, place, overwrite=True)
    assert place.read_bytes() == before
    assert os.listdir(place.parent) == ["model.keras"]


def test_bytes_that_did_not_arrive_are_missed(memory, local, monkeypatch):
    monkeypatch.setattr(files.shutil, "copyfileobj", lambda source, target, length: target.write(source.read(1000)))
    with pytest.raises(ConfigError, match="1000 of 1048576 bytes have arrived"):
        put_file(local, "mock://bucket/model.keras", overwrite=False)
    assert not [info for info in memory.get_file_info(fs.FileSelector("bucket", recursive=True)) if info.is_file]


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("/no/such/folder/model.keras", "there is no such file"),
        ("/", "it is a folder"),
        ("floppy://a/model.keras", "floppy"),
        ("", "a path or a URI"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, place, says):
    with pytest.raises(ConfigError, match=says) as refused:
        fetch_file(place, tmp_path)
    assert repr(place) in str(refused.value)


def test_a_place_where_nothing_can_be_written_is_named(local):
    with pytest.raises(ConfigError, match=r"'/proc/no/model.keras' cannot be written"):
        put_file(local, "/proc/no/model.keras", overwrite=False)
