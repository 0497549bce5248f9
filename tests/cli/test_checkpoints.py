"""`allreduce-spark checkpoints list` and `verify`: what a user sees of a folder of checkpoints. Export: tests/training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from allreduce_spark.checkpoint.manifest import Checksum, File, Manifest, share_name
from allreduce_spark.checkpoint.store import Store
from allreduce_spark.cli.checkpoints import table
from allreduce_spark.cli.main import main
from allreduce_spark.config import Checkpoint


def manifest(epoch: int, step: int, number: int, size: int = 100, **logs: object) -> Manifest:
    content = bytes(size)
    shares = tuple(File(share_name(rank, 0), size, Checksum(content).hexdigest()) for rank in range(2))
    settings = Checkpoint(keep=1, keep_best="val_loss")
    return Manifest(epoch, step, number, 2, shares, None, 1e9 + 60 * number, logs=logs, settings=settings)


@pytest.fixture
def store(tmp_path) -> Store:
    """Two complete checkpoints and an incomplete one."""
    store = Store(tmp_path / "fit")
    local = tmp_path / "share"
    local.write_bytes(bytes(100))
    for one in (manifest(1, 0, 1, val_loss=0.5), manifest(2, 0, 2, val_loss=0.75)):
        for rank in range(2):
            store.put_share(local, one.id, rank, 0)
        store.commit(one)
    store.put_share(local, "000002-00000010", 0, 0)
    return store


def test_the_table_says_what_there_is_and_why_it_is_kept():
    manifests = [
        manifest(0, 500, 1, size=1500),
        manifest(1, 0, 2, size=75_000_000, loss=0.123456, val_loss=0.5, per_class=[0.1, 0.2]),
        manifest(2, 250, 3, size=10),
    ]
    assert table(manifests, now=1e9 + 60 * 3 + 5).splitlines() == [
        "id               epoch  step  ranks  size    age       metrics                    kept as",
        "000000-00000500  0      500   2      3 kB    2.08 min  -                          -",
        "000001-00000000  1      0     2      150 MB  1.08 min  loss 0.1235, val_loss 0.5  best val_loss",
        "000002-00000250  2      250   2      20 B    5 s       -                          newest, last 1",
    ]


def test_listing_a_folder_also_names_what_is_incomplete_or_damaged(store, capsys):
    Path(store.place("000001-00000000", "manifest.json")).write_text("{")
    assert main(["checkpoints", "list", store.path]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("000002-00000000  2 ")
    assert lines[2] == "000002-00000010  incomplete: being written, or left by a fit that ended"
    assert lines[3].startswith("000001-00000000  damaged: manifest.json is damaged: it is not JSON")


def test_verifying_whole_checkpoints_is_a_success(store, capsys):
    assert main(["checkpoints", "verify", store.path]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ok    000001-00000000",
        "ok    000002-00000000",
        "-     000002-00000010  incomplete",
    ]


def test_verifying_names_every_problem_and_fails(store, capsys):
    Path(store.share_place("000001-00000000", 0, 0)).write_bytes(b"x" * 100)
    Path(store.share_place("000001-00000000", 1, 0)).unlink()
    assert main(["checkpoints", "verify", store.path]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "fail  000001-00000000",
        "      share-0-0.safetensors is not as it was written: its checksum is wrong",
        "      share-1-0.safetensors is missing",
        "ok    000002-00000000",
        "-     000002-00000010  incomplete",
    ]


@pytest.mark.parametrize("action", ["list", "verify"])
def test_a_folder_without_checkpoints_is_an_error_in_one_line(tmp_path, action, capsys):
    assert main(["checkpoints", action, str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"allreduce-spark: {str(tmp_path)!r} holds no checkpoints.\n"


def test_looking_at_checkpoints_needs_no_tensorflow(store):
    code = (
        "import sys; from allreduce_spark.cli.main import main; "
        "code = main(['checkpoints', 'verify', sys.argv[1]]); "
        "sys.exit(code or int('tensorflow' in sys.modules or 'keras' in sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", code, store.path], capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stderr) == (0, "")
