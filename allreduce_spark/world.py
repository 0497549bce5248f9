"""Who am I among the ranks: `World`, and what a rank is told when it joins: `Membership`. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Membership", "World", "worlds_of"]


@dataclass(frozen=True)
class World:
    """One rank's place in the group.

    Attributes:
        rank: Index of this process in the group, 0 <= rank < world_size. Rank 0 is the root.
        world_size: How many ranks reduce together.
        local_rank: Index among the ranks of the same host.
        local_size: Ranks on the same host.
        node_rank: Index of the host, counted in the order of each host's lowest rank.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    node_rank: int

    @property
    def is_root(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class Membership:
    """What one agent and its rank are told once everybody has joined: enough to open the communicator.

    Attributes:
        world: The rank's place in the group.
        generation: Which launch of the ranks within one fit, from 0. Every generation has a key space of its own.
        key_space: Name of the PMI key space; unique for ever, because MPICH derives shared-memory names from it.
        rows: Training rows of each shard of the fit. There are as many shards as ranks, or more where ranks were lost: shard s
            belongs to rank s % world_size.
        validation_rows: Rows of the validation set in each shard; all 0 where there is none.
    """

    world: World
    generation: int
    key_space: str
    rows: tuple[int, ...]
    validation_rows: tuple[int, ...]


def worlds_of(hosts: Sequence[object]) -> tuple[World, ...]:
    """Number the ranks of a group by the host each is on.

    Args:
        hosts: For each rank, in rank order, a key that two ranks share exactly if they share a host.

    Returns:
        One `World` per rank, in rank order.

    >>> [(w.rank, w.node_rank, w.local_rank) for w in worlds_of(["a", "b", "a"])]
    [(0, 0, 0), (1, 1, 0), (2, 0, 1)]
    """
    node_of = {host: node for node, host in enumerate(dict.fromkeys(hosts))}
    return tuple(
        World(
            rank=rank,
            world_size=len(hosts),
            local_rank=sum(other == host for other in hosts[:rank]),
            local_size=sum(other == host for other in hosts),
            node_rank=node_of[host],
        )
        for rank, host in enumerate(hosts)
    )
