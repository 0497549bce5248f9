"""The agent's folder: private, and gone afterwards, whatever its agent died of."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from allreduce_spark.launch.scratch import note_shared_memory, release_shared_memory, scratch_folder


@pytest.fixture
def disk(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARK_LOCAL_DIRS", f"{tmp_path},/somewhere/else")
    return tmp_path


@pytest.fixture
def segment():
    path = Path(f"/dev/shm/mpich_shm_test{secrets.token_hex(8)}_0")
    path.write_bytes(b"shared")
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def start_agent(disk):
    """Start a process that opens a scratch folder, says its name, and waits; (process, folder)."""
    processes = []

    def start() -> tuple[subprocess.Popen[str], Path]:
        code = (
            "import sys\n"
            "from allreduce_spark.launch.scratch import scratch_folder\n"
            "with scratch_folder() as folder:\n"
            "    (folder / 'train.arrow').write_bytes(bytes(1000))\n"
            "    print(folder, flush=True)\n"
            "    sys.stdin.readline()\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        processes.append(process)
        return process, Path(process.stdout.readline().strip())

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_nobody_else_can_read_the_folder_and_it_is_on_the_disk_of_spark(disk):
    with scratch_folder() as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert folder.parent == disk


def test_the_folder_is_gone_afterwards(disk):
    with scratch_folder() as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("text")
    assert list(disk.iterdir()) == []


def test_the_folder_is_gone_after_an_exception_too(disk):
    with pytest.raises(ValueError, match="as it was"), scratch_folder():
        raise ValueError("as it was")
    assert list(disk.iterdir()) == []


def test_a_folder_that_has_gone_by_itself_is_no_error(disk):
    with scratch_folder() as folder:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def test_the_folder_of_a_killed_agent_is_removed_by_the_next_and_that_of_a_living_one_is_not(disk, start_agent):
    dead, abandoned = start_agent()
    _, in_use = start_agent()
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    assert abandoned.exists()
    with scratch_folder():
        assert not abandoned.exists()
        assert (in_use / "train.arrow").exists()
    assert (in_use / "train.arrow").exists()


def test_an_agent_removes_what_lost_executors_of_its_machine_have_left(tmp_path, monkeypatch, start_agent):
    def executor(name):
        (tmp_path / name).mkdir()
        monkeypatch.setenv("SPARK_LOCAL_DIRS", str(tmp_path / name))

    executor("blockmgr-lost")
    dead, abandoned = start_agent()
    _, in_use = start_agent()
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    executor("elsewhere")
    with scratch_folder():
        assert abandoned.exists()
    executor("blockmgr-new")
    with scratch_folder() as folder:
        assert folder.parent.name == "blockmgr-new"
        assert not abandoned.exists()
        assert (in_use / "train.arrow").exists()


def test_a_child_of_the_agent_does_not_keep_the_folder_locked(disk):
    """The rank outlives its agent for a moment; what it inherits must not hold the lock."""
    code = (
        "import os, subprocess, sys\n"
        "from allreduce_spark.launch.scratch import scratch_folder\n"
        "with scratch_folder() as folder:\n"
        "    child = subprocess.Popen(['sleep', '30'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        "    print(folder, child.pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    abandoned, child = answer.stdout.split()
    try:
        with scratch_folder():
            assert not Path(abandoned).exists()
    finally:
        os.kill(int(child), signal.SIGKILL)


def test_shared_memory_that_was_noted_is_released_with_the_folder(disk, segment):
    with scratch_folder() as folder:
        note_shared_memory(folder, {str(segment)})
    assert not segment.exists()


def test_a_later_note_replaces_the_earlier_and_an_empty_one_does_not(disk, segment):
    with scratch_folder() as folder:
        note_shared_memory(folder, {"/dev/shm/mpich_shm_long_gone"})
        note_shared_memory(folder, {str(segment)})
        note_shared_memory(folder, set())
    assert not segment.exists()


def test_the_shared_memory_of_a_killed_agent_is_released_by_the_next(disk, start_agent, segment):
    dead, abandoned = start_agent()
    note_shared_memory(abandoned, {str(segment)})
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    with scratch_folder():
        assert not segment.exists()


@pytest.mark.parametrize(
    "name", ["{folder}/precious", "/dev/shm/mpich_shm_x/../..{folder}/precious", "precious", "/dev/shm"]
)
def test_nothing_but_shared_memory_of_mpich_is_ever_unlinked(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    precious = tmp_path / "precious"
    precious.write_text("text")
    (tmp_path / "shared_memory").write_text(name.format(folder=tmp_path))
    release_shared_memory(tmp_path)
    assert precious.exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")
def test_a_folder_that_another_user_laid_there_is_left_alone(disk, segment):
    trap = disk / "allreduce_spark-trap"
    trap.mkdir()
    (trap / "lock").touch()
    (trap / "shared_memory").write_text(str(segment))
    os.chown(trap, 12345, 12345)
    with scratch_folder():
        pass
    assert trap.exists()
    assert segment.exists()


def test_what_only_looks_like_a_folder_of_ours_is_left_alone(disk):
    (disk / "allreduce_spark-notes").write_text("a file")
    (disk / "allreduce_spark-project").mkdir()
    with scratch_folder():
        pass
    assert sorted(path.name for path in disk.iterdir()) == ["allreduce_spark-notes", "allreduce_spark-project"]


def test_without_spark_the_folder_is_where_temporary_files_are(monkeypatch, tmp_path):
    monkeypatch.delenv("SPARK_LOCAL_DIRS", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with scratch_folder() as folder:
        assert folder.parent == tmp_path
