"""Shares: what is written comes back to the bit, complete or absent, and files that are written over hurt nobody."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from allreduce_spark.checkpoint import share_format, shares
from allreduce_spark.checkpoint.manifest import Checksum
from allreduce_spark.checkpoint.shares import ShareWriter, deal, held, read_share
from allreduce_spark.errors import CheckpointError, ConfigError


def tensors_of_every_kind() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    plain = [bool, np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]
    other = [np.float16, np.float32, np.float64, np.complex64, np.complex128]
    small = [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.int4]
    arrays = {
        f"shared/{np.dtype(kind).name}": draw.normal(0, 3, (3, 5)).astype(kind) for kind in [*plain, *other, *small]
    }
    return {
        **arrays,
        "own/number": np.array(7, np.int64),
        "own/nothing": np.zeros((0, 3), np.float32),
        "own/not a number": np.array([np.nan, np.inf, -0.0]),
        "own/columns": np.asfortranarray(draw.normal(size=(4, 6))),
        "own/every other": np.arange(10, dtype=np.int32)[::2],
        "own/big endian": np.arange(5, dtype=">f4"),
    }


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


def published(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("spare-"))


def save(writer: ShareWriter, checkpoint: str, value: float, size: int = 1000) -> shares.Saved:
    writer.copy(checkpoint, {"a": np.full(size, value, np.float32)}, {"value": value})
    return writer.finish()


def test_every_kind_of_tensor_comes_back_to_the_bit(tmp_path):
    tensors = tensors_of_every_kind()
    about = {"epoch": 3, "best": float("inf"), "random": [3, [1, 2**31], None], "text": "Ä"}
    writer = ShareWriter(tmp_path / "checkpoints", 1)
    writer.copy("000003-00000000", tensors, about)
    saved = writer.finish()
    assert saved.path == tmp_path / "checkpoints" / "000003-00000000.share-1.safetensors"
    content = saved.path.read_bytes()
    assert (saved.bytes, saved.checksum) == (len(content), Checksum(content).hexdigest())
    share = read_share(saved.path)
    assert share.about == about
    assert set(share.tensors) == set(tensors)
    for name, array in tensors.items():
        assert same_bits(share.tensors[name], array.astype(array.dtype.newbyteorder("<"))), name
        assert share.tensors[name].flags.aligned


def test_other_programs_load_the_file(tmp_path):
    tensors = tensors_of_every_kind()
    writer = ShareWriter(tmp_path, 0)
    writer.copy("000000-00000001", tensors, {})
    loaded = load_file(writer.finish().path)
    assert set(loaded) == set(tensors)
    assert same_bits(loaded["shared/float32"], tensors["shared/float32"])
    assert loaded["shared/bfloat16"].tobytes() == tensors["shared/bfloat16"].tobytes()


def test_what_is_changed_after_the_copy_is_not_in_the_share(tmp_path):
    array, about = np.zeros(100, np.float32), {"history": [1]}
    writer = ShareWriter(tmp_path, 0)
    writer.copy("000000-00000001", {"a": array}, about)
    array += 1
    about["history"].append(2)
    share = read_share(writer.finish().path)
    assert not share.tensors["a"].any()
    assert share.about == {"history": [1]}


def test_the_newest_two_stay_and_old_files_are_written_over(tmp_path):
    writer = ShareWriter(tmp_path, 0)
    files = set()
    for step in range(1, 9):
        # Headers and tensors of changing length: nothing of an old content may show.
        saved = save(writer, f"000000-{step:08d}", 10.0**step, size=1000 - step * (step % 3))
        files.add(saved.path.stat().st_ino)
        assert saved.path.stat().st_size == saved.bytes
        assert Checksum(saved.path.read_bytes()).hexdigest() == saved.checksum
        assert read_share(saved.path).about == {"value": 10.0**step}
        assert set(read_share(saved.path).tensors["a"]) == {np.float32(10.0**step)}
    assert published(tmp_path) == [f"000000-{step:08d}.share-0.safetensors" for step in (7, 8)]
    assert len(files) == len(os.listdir(tmp_path)) == 3


def test_a_share_that_is_held_is_not_written_over(tmp_path):
    writer = ShareWriter(tmp_path, 0)
    first = save(writer, "000000-00000001", 1.0)
    with held(first.path) as link:
        for step in range(2, 9):
            save(writer, f"000000-{step:08d}", float(step))
        assert not first.path.exists()
        assert Checksum(link.read_bytes()).hexdigest() == first.checksum
        with pytest.raises(CheckpointError, match=r"00000001\.share-0.* cannot be held"), held(first.path):
            pass
    assert not link.exists()


def test_whoever_reads_beside_the_writer_sees_whole_shares(tmp_path):
    writer, announced, seen = ShareWriter(tmp_path, 0), queue.SimpleQueue(), []

    def read() -> None:
        while (saved := announced.get()) is not None:
            with contextlib.suppress(CheckpointError), held(saved.path) as link:  # given up before we came
                seen.append(Checksum(link.read_bytes()).hexdigest() == saved.checksum)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for step in range(200):
            announced.put(save(writer, f"000000-{step:08d}", float(step), size=100_000))
    finally:
        announced.put(None)
        reader.join()
    assert seen
    assert all(seen)


WRITE_UNTIL_KILLED = """
import sys
from pathlib import Path
import numpy as np
from allreduce_spark.checkpoint.shares import ShareWriter

writer = ShareWriter(Path(sys.argv[1]), 0)
for step in range(10**6):
    writer.copy(f"000000-{step:08d}", {"a": np.full(300_000, step)}, {"step": step})
    writer.finish()
    print(step, flush=True)
"""


@pytest.mark.parametrize("shares_before", [1, 2, 3, 10, 30])
def test_a_rank_that_is_killed_while_it_writes_leaves_whole_shares(tmp_path, shares_before):
    command = [sys.executable, "-c", WRITE_UNTIL_KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as rank:
        for _ in range(shares_before):
            rank.stdout.readline()
        rank.kill()
    left = [tmp_path / name for name in published(tmp_path)]
    assert min(shares_before, 2) <= len(left) <= 3  # three for the moment in which the oldest one is given up
    for path in left:
        share = read_share(path)
        assert path.name == f"000000-{share.about['step']:08d}.share-0.safetensors"
        assert set(share.tensors["a"]) == {share.about["step"]}
    resumed = left[0].name.partition(".")[0]
    ShareWriter(tmp_path, 0, resumed=resumed)
    assert os.listdir(tmp_path) == [left[0].name]


def test_a_rank_that_starts_again_keeps_what_it_resumes_from_and_never_writes_over_it(tmp_path):
    before = ShareWriter(tmp_path, 0)
    for step in (1, 2):
        save(before, f"000000-{step:08d}", float(step))
    save(ShareWriter(tmp_path, 1), "000000-00000002", -1.0)
    (tmp_path / "spare-00.share-0.safetensors").write_bytes(b"of a rank that was killed")

    after = ShareWriter(tmp_path, 0, resumed="000000-00000001")
    resumed = read_share(tmp_path / "000000-00000001.share-0.safetensors")
    assert published(tmp_path) == ["000000-00000001.share-0.safetensors", "000000-00000002.share-1.safetensors"]
    for step in range(2, 8):
        save(after, f"000000-{step:08d}", float(step))
    assert set(resumed.tensors["a"]) == {np.float32(1)}
    assert len(os.listdir(tmp_path)) == 4

    ShareWriter(tmp_path, 0)
    assert os.listdir(tmp_path) == ["000000-00000002.share-1.safetensors"]


def test_a_full_disk_is_one_clear_error_and_the_shares_from_before_stay(tmp_path):
    writer = ShareWriter(tmp_path, 0)
    kept = [save(writer, f"000000-{step:08d}", float(step)) for step in (1, 2)]
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))
    try:
        with pytest.raises(
            CheckpointError, match=r"00000003\.share-0\.safetensors' cannot be written: .*File too large"
        ):
            save(writer, "000000-00000003", 3.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(os.listdir(tmp_path)) == [saved.path.name for saved in kept]
    assert read_share(save(writer, "000000-00000004", 4.0).path).about == {"value": 4.0}


def test_a_share_that_was_cut_off_anywhere_is_refused(tmp_path):
    saved = save(ShareWriter(tmp_path, 0), "000000-00000001", 1.0, size=20)
    content = saved.path.read_bytes()
    for length in range(len(content)):
        saved.path.write_bytes(content[:length])
        with pytest.raises(
            ConfigError, match=r"00000001\.share-0\.safetensors' is .*(damaged|empty|not written to its end)"
        ):
            read_share(saved.path)


def test_foreign_files_are_named_for_what_they_are(tmp_path):
    path = tmp_path / "share-0.safetensors"

    def refused(content: bytes, says: str) -> None:
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=says):
            read_share(path)

    refused(pickle.dumps({"weights": [1.0]}), "it is a pickle, which could run any code")
    refused(b"PK\x03\x04 a model", "it is a zip archive")
    refused(b"\xff" * 100, "damaged")
    save_file({"a": np.zeros(3)}, path)
    refused(path.read_bytes(), "is a safetensors file, but no share of a checkpoint")
    for metadata, says in (
        ({"version": "9"}, "written by a newer version of allreduce-spark .share format 9; this one reads up to 1"),
        ({}, "damaged"),
        ({"version": "1", "dtypes": '{"a": "O"}', "about": "{}"}, "'O' cannot be in a checkpoint"),
        ({"version": "1", "dtypes": '{"a": "no such type"}', "about": "{}"}, "damaged"),
        ({"version": "1", "dtypes": "{}", "about": "[1]"}, "damaged"),
    ):
        save_file({"a": np.zeros((3, 8), np.uint8)}, path, metadata={"format": share_format.FORMAT, **metadata})
        refused(path.read_bytes(), says)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_share(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "array", [np.array([object()]), np.array(["text"]), np.zeros(2, "M8[s]"), np.zeros(2, "i4,f4")]
)
def test_only_numbers_are_tensors(tmp_path, array):
    with pytest.raises(ConfigError, match="'a' cannot be in a checkpoint"):
        ShareWriter(tmp_path, 0).copy("000000-00000001", {"a": array}, {})


def test_what_is_beside_the_tensors_is_plain(tmp_path):
    with pytest.raises(ConfigError, match="must be plain values"):
        ShareWriter(tmp_path, 0).copy("000000-00000001", {}, {"callback": object()})


def test_one_share_is_finished_before_the_next_is_copied(tmp_path):
    writer = ShareWriter(tmp_path, 0)
    with pytest.raises(RuntimeError, match="nothing was copied"):
        writer.finish()
    writer.copy("000000-00000001", {}, {})
    with pytest.raises(RuntimeError, match="not finished"):
        writer.copy("000000-00000002", {}, {})


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_tensors_are_dealt_out_once_evenly_and_the_same_everywhere(world_size):
    sizes = {f"t{index}": int(size) for index, size in enumerate(np.random.default_rng(1).integers(1, 1000, 60))}
    dealt = deal(sizes, world_size)
    assert sorted(name for names in dealt for name in names) == sorted(sizes)
    loads = [sum(sizes[name] for name in names) for names in dealt]
    assert max(loads) <= 4 / 3 * sum(loads) / world_size + 1
    assert deal(dict(reversed(sizes.items())), world_size) == dealt
    assert deal({}, world_size) == [[]] * world_size


def test_the_header_is_json_that_anybody_can_read(tmp_path):
    saved = save(ShareWriter(tmp_path, 0), "000000-00000001", 1.0)
    content = saved.path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert (8 + length) % share_format.ALIGNMENT == 0
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    assert metadata == {"format": share_format.FORMAT, "version": "1", "dtypes": "{}", "about": '{"value": 1.0}'}
