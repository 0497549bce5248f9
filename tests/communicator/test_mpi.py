"""What is special about ranks that are MPI processes: they start without mpirun, end, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from allreduce_spark.communicator.mpich import mpi_environment, shared_memory_segments
from allreduce_spark.world import World

WITHOUT_MPI = "import sys; sys.modules['mpi4py'] = None; import allreduce_spark.communicator.mpi"


def test_ranks_that_work_have_no_name_left_in_dev_shm(mpi_ranks):
    assert mpi_ranks.run("names_of_own_segments") == [[], []]


def test_a_group_opens_although_one_rank_is_late(mpi_ranks):
    assert mpi_ranks.run("second_group_with_a_late_rank", late=1, by_s=0.2) == [2.0, 2.0]


def test_a_killed_rank_makes_the_others_fail_and_leaves_nothing_behind(mpi_ranks):
    before = set(os.listdir("/dev/shm"))
    mpi_ranks.processes[1].send_signal(signal.SIGKILL)
    survivor, killed = mpi_ranks.outcomes("one_rank_is_silent", silent=1, timeout_s=0.5)
    assert survivor.error == "CollectiveTimeoutError"
    assert killed is None
    mpi_ranks.kill()
    assert set(os.listdir("/dev/shm")) <= before


def test_ranks_end_by_themselves_after_an_abort(mpi_ranks):
    mpi_ranks.outcomes("one_rank_aborts", aborts=0)
    assert mpi_ranks.exit_codes(within_s=5.0) == [0, 0]


def test_ranks_end_by_themselves_after_a_timeout(mpi_ranks):
    mpi_ranks.outcomes("error_after_a_timeout", silent=1)
    # Rank 1 still believes in the group, and would close it politely.
    mpi_ranks.processes[1].kill()
    assert mpi_ranks.exit_codes(within_s=5.0)[0] == 0


def test_a_rank_that_an_exception_ends_does_not_wait_in_finalize(mpi_ranks):
    started = time.monotonic()
    survivor, gone = mpi_ranks.outcomes("raise_out_of_the_program", rank=1, timeout_s=2.0)
    assert gone is None
    assert mpi_ranks.processes[1].wait(5) == 3
    assert survivor.error == "CollectiveTimeoutError"
    assert time.monotonic() - started < 8


def test_mpi_that_came_up_alone_is_an_error_that_says_what_to_do(start_rank, rank_process):
    control, process = start_rank(World(1, 2, 1, 2, 0), 5.0, {}, [])  # no PMI_FD: what Open MPI would make of it
    try:
        error, message = rank_process.receive(control)
        assert error == "ConfigError"
        assert "MPI came up as rank 0 of 1, but this process is rank 1 of 2" in message
        assert "pip install mpich" in message
    finally:
        control.close()
        process.kill()
        process.wait()


def test_a_machine_without_mpi4py_is_told_what_to_install():
    ended = subprocess.run([sys.executable, "-c", WITHOUT_MPI], capture_output=True, text=True, timeout=30)
    assert "MissingDependencyError" in ended.stderr
    assert "pip install mpi4py mpich" in ended.stderr


def test_importing_the_room_does_not_load_mpi():
    rooms = "allreduce_spark.communicator.local, allreduce_spark.communicator.mpich"
    code = f"import sys, {rooms}; assert 'mpi4py' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_ranks_sum_rightly_where_the_kernel_lets_none_read_the_memory_of_another():
    program = str(Path(__file__).with_name("confined.py"))
    ended = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=90)
    assert ended.returncode == 0, ended.stderr


def test_the_environment_names_one_interface_and_keeps_what_the_user_set():
    cma = {"MPIR_CVAR_CH4_CMA_ENABLE": "1"}  # without it, what is wanted depends on the kernel
    assert mpi_environment("eth0", given=cma) == {
        "MPIR_CVAR_CH4_NETMOD": "ofi",
        "FI_PROVIDER": "tcp",
        "FI_TCP_IFACE": "eth0",
        "UCX_NET_DEVICES": "eth0",
    }
    assert mpi_environment("eth0", given={"FI_PROVIDER": "verbs", "FI_TCP_IFACE": "ib0", **cma}) == {
        "MPIR_CVAR_CH4_NETMOD": "ofi",
        "UCX_NET_DEVICES": "eth0",
    }
    assert "FI_TCP_IFACE" not in mpi_environment(None, given={})


def test_the_segments_that_a_process_maps_are_found():
    name = f"/dev/shm/mpich_shm_test{os.getpid()}_0"
    opened = f"file = open('{name}', 'r+b'); memory = mmap.mmap(file.fileno(), 0)"
    code = f"import mmap, sys; {opened}; print(flush=True); sys.stdin.read()"
    with open(name, "wb") as segment:
        segment.write(bytes(4096))
    try:
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            assert shared_memory_segments(process.pid) == {name}
            os.unlink(name)
            assert shared_memory_segments(process.pid) == set()
            process.stdin.close()
    finally:
        if os.path.exists(name):
            os.unlink(name)
    assert shared_memory_segments(process.pid) == set()
