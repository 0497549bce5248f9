"""What a machine is, and what the environment of a rank holds."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from allreduce_spark.launch import environment
from allreduce_spark.launch.environment import host_key, interface_of, rank_environment, thread_share


def test_two_processes_of_one_machine_have_one_host_key():
    code = "from allreduce_spark.launch.environment import host_key; print(host_key())"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert answer.stdout.strip() == host_key()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a namespace")
@pytest.mark.parametrize(
    "container",
    [
        ["unshare", "--pid", "--fork", "sh", "-c"],
        ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /dev/shm && exec sh -c "$0"'],
    ],
    ids=["processes of its own", "memory of its own"],
)
def test_a_process_that_cannot_share_memory_has_another_host_key(container):
    code = "from allreduce_spark.launch.environment import host_key; print(host_key())"
    command = [*container, f"{sys.executable} -c '{code}'"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if answer.returncode:
        pytest.skip(f"no namespaces here: {answer.stderr}")
    assert answer.stdout.strip().count("/") == 2
    assert answer.stdout.strip() != host_key()


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_the_loopback_address_is_that_of_the_loopback_interface(address):
    if address == "::1" and not has_ipv6():
        pytest.skip("no IPv6 here")
    assert interface_of(address) == "lo"


def test_the_address_of_the_route_outwards_is_that_of_an_interface():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("203.0.113.1", 9))  # sends nothing
        except OSError:
            pytest.skip("no route outwards")
        address = probe.getsockname()[0]
    assert interface_of(address) in {name for _, name in socket.if_nameindex()} - {"lo"}


@pytest.mark.parametrize("address", ["203.0.113.7", "2001:db8::7"])
def test_an_address_that_is_not_of_this_machine_has_no_interface(address):
    assert interface_of(address) is None


@pytest.mark.parametrize(
    ("cores", "task_cpus", "local_size", "threads"),
    [(8, 1, 2, 4), (8, 1, 1, 8), (8, 6, 2, 6), (2, 1, 4, 1), (1, 1, 3, 1), (7, 1, 2, 3)],
)
def test_a_rank_has_its_share_of_the_cores_and_what_its_task_asked_for(
    monkeypatch, cores, task_cpus, local_size, threads
):
    monkeypatch.setattr(environment.os, "sched_getaffinity", lambda pid: set(range(cores)))
    assert thread_share(task_cpus, local_size) == threads


def environment_of_rank(inherited=(), *, threads=3, gpus=None, extra=()):
    return rank_environment(dict(inherited), threads=threads, gpus=gpus, extra=dict(extra))


def test_a_rank_inherits_what_its_worker_has_but_not_the_number_of_threads():
    made = environment_of_rank({"HOME": "/home/me", "OMP_NUM_THREADS": "1"})
    assert made["HOME"] == "/home/me"
    assert {made[f"{library}_NUM_THREADS"] for library in ("OMP", "OPENBLAS", "MKL")} == {"3"}


def test_a_rank_finds_the_modules_that_its_worker_finds(monkeypatch):
    monkeypatch.setattr(sys, "path", ["", "/py-files/job.zip", "/site-packages"])
    assert environment_of_rank({"PYTHONPATH": "/old"})["PYTHONPATH"] == "/py-files/job.zip:/site-packages"


@pytest.mark.parametrize(("gpus", "visible"), [(("3",), "3"), (("0", "2"), "0,2"), ((), ""), (None, "7")])
def test_a_rank_sees_the_gpus_of_its_task_and_without_that_resource_what_the_worker_sees(gpus, visible):
    assert environment_of_rank({"CUDA_VISIBLE_DEVICES": "7"}, gpus=gpus)["CUDA_VISIBLE_DEVICES"] == visible


def test_what_is_given_extra_wins_and_the_users_own_log_level_stays():
    made = environment_of_rank({"FI_PROVIDER": "psm3", "TF_CPP_MIN_LOG_LEVEL": "0"}, extra={"FI_PROVIDER": "tcp"})
    assert made["FI_PROVIDER"] == "tcp"
    assert made["TF_CPP_MIN_LOG_LEVEL"] == "0"
    assert environment_of_rank()["TF_CPP_MIN_LOG_LEVEL"] == "2"
    assert environment_of_rank()["PYTHONUNBUFFERED"] == "1"
