"""What the driver makes of the GPUs that the agents tell of: who shares one, who has none, and what that means for NCCL."""

from __future__ import annotations

import logging

import pytest

from allreduce_spark.errors import ConfigError
from allreduce_spark.rendezvous.group import Join
from allreduce_spark.spark.approval import check_gpus, choose_backend


def joins_of(*gpus: str, nccl: bool = False) -> list[Join]:
    """Ranks in their order, each with its place and GPUs: "a:0" is GPU 0 of host a, "a:" a rank there that has none."""
    found = []
    for rank, text in enumerate(gpus):
        host, _, addresses = text.partition(":")
        mine = tuple(addresses.split(",")) if addresses else ()
        found.append(Join(rank, f"host-{host}", host, (), gpus=mine, nccl=nccl and bool(mine)))
    return found


@pytest.mark.parametrize("gpus", [["a:", "a:", "b:"], ["a:0", "a:1", "b:0"], ["a:GPU-1", "a:GPU-2"]])
def test_ranks_with_a_gpu_each_and_ranks_without_any_are_welcome(gpus, caplog):
    check_gpus(joins_of(*gpus), 1, gpus_per_rank=1)
    assert not caplog.records


def test_ranks_that_would_share_a_gpu_are_refused_unless_they_may():
    joins = joins_of("a:0", "b:0", "a:0", "a:1")
    with pytest.raises(
        ConfigError, match=r"the ranks 0, 2 would share GPU 0 on host-a, and ranks_per_gpu=1.*ranks_per_gpu=2"
    ):
        check_gpus(joins, 1)
    check_gpus(joins, 2)
    with pytest.raises(ConfigError, match="the ranks 0, 1 would share GPU GPU-1"):  # in two containers of one machine
        check_gpus(joins_of("a:GPU-1", "b:GPU-1"), 1)
    with pytest.raises(ConfigError, match="the ranks 0, 1, 2"):
        check_gpus(joins_of("a:0", "a:0", "a:0"), 2)


def test_a_rank_trains_on_one_gpu_and_a_function_may_use_more():
    joins = joins_of("a:0,1", "a:2,3")
    with pytest.raises(ConfigError, match=r"gives each task 2 GPUs \(0, 1 to rank 0 on host-a\).*gpu\.amount"):
        check_gpus(joins, 1, gpus_per_rank=1)
    check_gpus(joins, 1)


def test_a_group_of_which_only_some_have_a_gpu_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING, "allreduce_spark"):
        check_gpus(joins_of("a:0", "b:", "a:1", "b:"), 1)
    assert "the ranks 1, 3 have no GPU" in caplog.text


def test_auto_is_horovod_where_each_rank_has_a_gpu_of_its_own_that_it_can_use():
    alone, shared, mixed = ["a:0", "a:1"], ["a:0", "a:0"], ["a:0", "a:"]
    for gpus, chosen in ((alone, "horovod"), (shared, "mpi"), (mixed, "mpi")):
        assert choose_backend("auto", joins_of(*gpus, nccl=True)) == chosen
    assert choose_backend("auto", joins_of(*alone)) == "mpi"


@pytest.mark.parametrize(
    ("gpus", "says"), [(["a:0", "a:0"], "ranks share one"), (["a:0", "a:", "b:"], "the ranks 1, 2 have none")]
)
@pytest.mark.parametrize("backend", ["horovod", "horovod-mpi"])
def test_nccl_takes_one_gpu_for_each_rank(gpus, says, backend):
    with pytest.raises(ConfigError, match=f"backend='{backend}' reduces by NCCL.*{says}.*backend='mpi'"):
        choose_backend(backend, joins_of(*gpus, nccl=True))
    assert choose_backend(backend, joins_of(*gpus)) == backend, "a Horovod without NCCL sums on processors"
    assert choose_backend("mpi", joins_of(*gpus, nccl=True)) == "mpi"
