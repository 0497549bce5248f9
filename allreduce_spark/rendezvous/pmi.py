"""The PMI-1 words that MPICH speaks at MPI_Init, answered as a pure state machine: no sockets, no threads.

A process becomes an MPI rank if its environment holds what `environment` returns. Over the file descriptor `PMI_FD` it
then asks, line by line, for its key space, puts its address there, waits in barriers and gets the others' addresses.
Whoever holds the other ends passes each line to `KeySpace.answer` and sends the replies, so MPI needs no launcher.

The words are those of MPICH's own client (`src/pmi/src/pmi_v1.c`). RFC 13 of the Flux framework tells them in prose:
https://flux-framework.readthedocs.io/projects/flux-rfc/en/latest/spec_13.html
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import groupby
from typing import Final

from allreduce_spark.errors import ProtocolError, RankFailedError

__all__ = ["KEY_LIMIT", "NAME_LIMIT", "VALUE_LIMIT", "KeySpace", "environment", "process_mapping"]

logger = logging.getLogger(__name__)

# In bytes, and with the zero byte that the rank's C code puts at the end: what `cmd=get_maxes` announces.
NAME_LIMIT: Final = 256
KEY_LIMIT: Final = 64
VALUE_LIMIT: Final = 1024
KEYS_PER_RANK: Final = 1024  # MPICH puts a handful

_MAPPING_KEY: Final = "PMI_process_mapping"

Reply = tuple[int, str]


class KeySpace:
    """The keys and the barrier that the ranks of one generation share while MPI starts.

    Not safe to call from several threads at once. Nothing here knows the time: whoever reads the ranks' lines keeps the
    deadline, and `waiting_for` tells whom to name when it passes.

    Args:
        name: Must be new for every generation: MPICH hashes it into the names of its shared memory, and two groups of
            one name corrupt each other. No whitespace and no `=`.
        size: How many ranks there are.
        process_mapping: Which ranks share a host, as `process_mapping()` says it.

    Raises:
        ValueError: The name is empty, too long or has whitespace in it, or `size` is not positive.
    """

    def __init__(self, name: str, size: int, process_mapping: str) -> None:
        if not name or len(name.encode()) >= NAME_LIMIT or "=" in name or name.split() != [name]:
            raise ValueError(
                f"a PMI key space needs a name of 1 to {NAME_LIMIT - 1} bytes without whitespace or '=', got {name!r}"
            )
        if size < 1:
            raise ValueError(f"a PMI key space needs at least 1 rank, got size={size}")
        self.name, self.size = name, size
        self._values = {_MAPPING_KEY: process_mapping}
        self._in_barrier: set[int] = set()

    @property
    def waiting_for(self) -> tuple[int, ...]:
        """The ranks that have not come to the barrier in which others wait; empty while nobody waits."""
        return tuple(rank for rank in range(self.size) if rank not in self._in_barrier) if self._in_barrier else ()

    def answer(self, rank: int, line: str) -> list[Reply]:
        """Take one line from a rank, and say what to send to whom.

        Args:
            rank: Who said it; known from the connection, never from the line.
            line: Such as `cmd=put kvsname=n key=k value=v`, with or without the newline at its end.

        Returns:
            Pairs (rank, line without newline), to send in this order. Empty while the rank has to wait for others.

        Raises:
            RankFailedError: The rank called MPI_Abort, or MPI did for it: the generation is over.
            ProtocolError: The line is not PMI-1 at all, or `rank` is not of this group.
        """
        if not 0 <= rank < self.size:
            raise ProtocolError(f"rank {rank} sent a PMI line to '{self.name}', which has ranks 0 to {self.size - 1}")
        fields = _fields(line)
        command = fields.get("cmd") or fields.get("mcmd")
        match command:
            case None:
                raise ProtocolError(f"rank {rank} sent a PMI line without 'cmd=' to '{self.name}': {line[:200]!r}")
            case "abort":
                raise RankFailedError(f"called MPI_Abort with exit code {fields.get('exitcode', 'unknown')}", rank=rank)
            case "barrier_in" if "group" not in fields:
                return self._barrier(rank)
            case "put" | "get" if fields.get("kvsname") != self.name:
                message = "wrong_kvsname" if "kvsname" in fields else "no_kvsname"
                return [(rank, f"cmd={command}_result rc=-1 msg={message} value=unknown")]
            case "put":
                return [(rank, f"cmd=put_result {self._put(fields.get('key', ''), fields.get('value', ''))}")]
            case "get":
                return [(rank, f"cmd=get_result {self._get(fields.get('key', ''))}")]
        return [(rank, self._constant_answer(command, fields))]

    def _constant_answer(self, command: str, fields: dict[str, str]) -> str:
        """The answers that do not depend on what was said before."""
        match command:
            case "init" if fields.get("pmi_version") == "1":
                return f"cmd=response_to_init pmi_version=1 pmi_subversion={fields.get('pmi_subversion', '1')} rc=0"
            case "init":
                return "cmd=response_to_init pmi_version=1 pmi_subversion=1 rc=-1"
            case "get_maxes":
                return f"cmd=maxes kvsname_max={NAME_LIMIT} keylen_max={KEY_LIMIT} vallen_max={VALUE_LIMIT}"
            case "get_appnum":
                return "cmd=appnum appnum=0"
            case "get_universe_size":
                return f"cmd=universe_size size={self.size}"
            case "get_my_kvsname":
                return f"cmd=my_kvsname kvsname={self.name}"
            case "finalize":
                return "cmd=finalize_ack"
        # Spawning, name publishing and barriers of a part of the ranks: MPI_Init and the collectives need none of them.
        logger.warning("PMI command %r is not supported; answered with rc=-1", command)
        return f"cmd={command} rc=-1 msg=not_supported"

    def _barrier(self, rank: int) -> list[Reply]:
        if rank in self._in_barrier:
            raise ProtocolError(f"rank {rank} came twice to one barrier of key space '{self.name}'")
        self._in_barrier.add(rank)
        if len(self._in_barrier) < self.size:
            return []
        self._in_barrier.clear()
        return [(member, "cmd=barrier_out") for member in range(self.size)]

    def _put(self, key: str, value: str) -> str:
        if not key or len(key.encode()) >= KEY_LIMIT:
            return f"rc=-1 msg=key_not_of_1_to_{KEY_LIMIT - 1}_bytes"
        if len(value.encode()) >= VALUE_LIMIT:
            return f"rc=-1 msg=value_longer_than_{VALUE_LIMIT - 1}_bytes"
        if key not in self._values and len(self._values) >= KEYS_PER_RANK * self.size:
            return "rc=-1 msg=too_many_keys"
        self._values[key] = value
        return "rc=0 msg=success"

    def _get(self, key: str) -> str:
        if key not in self._values:
            return "rc=-1 msg=key_not_found value=unknown"  # how MPICH learns that an optional key is not set
        return f"rc=0 msg=success value={self._values[key]}"


def _fields(line: str) -> dict[str, str]:
    """Split a line into its `key=value` words. The value of `value=` runs to the end: it may hold spaces and `=`."""
    words, _, value = line.strip("\r\n").partition(" value=")
    fields = dict(word.split("=", 1) for word in words.split() if "=" in word)
    return {**fields, "value": value} if value else fields


def process_mapping(nodes: Sequence[int]) -> str:
    """Say which ranks share a host, in the words of MPICH's `PMI_process_mapping`.

    Ranks that share a host also share memory, so build `nodes` from hosts that were seen to share memory: equal names
    do not prove it (containers), and MPICH crashes or hangs where it does not hold.

    Each block `(first_node, num_nodes, ranks_per_node)` stands for that many consecutive ranks, and the blocks follow
    each other in rank order. They always name every rank: what MPICH does after the last block (it starts again at
    one whose first node is 0) has changed between versions, so it is not relied on.

    Args:
        nodes: For each rank, in rank order, the index of its host; `World.node_rank`.

    Returns:
        The value, shorter than `VALUE_LIMIT`. A layout so scattered that it does not fit is given as one host for each
        rank: right, but ranks of one host then talk by TCP; a warning says so. Ranks numbered host by host always fit
        on 60 hosts, and on any number of hosts with equally many ranks.

    >>> process_mapping([0, 0, 1, 1])
    '(vector,(0,2,2))'
    >>> process_mapping([0, 1, 0])
    '(vector,(0,2,1),(0,1,1))'
    """
    blocks: list[tuple[int, int, int]] = []
    for node, ranks in groupby(nodes):
        size = len(list(ranks))
        first, count, size_before = blocks[-1] if blocks else (0, 0, 0)
        if blocks and node == first + count and size == size_before:
            blocks[-1] = (first, count + 1, size)
        else:
            blocks.append((node, 1, size))
    value = "(vector," + ",".join(f"({first},{count},{size})" for first, count, size in blocks) + ")"
    if len(value) < VALUE_LIMIT:
        return value
    logger.warning(
        "the layout of %d ranks on %d hosts takes %d bytes, more than the %d that PMI has room for: ranks of one host "
        "will use TCP instead of shared memory. Number the ranks host by host to avoid this.",
        len(nodes), len(set(nodes)), len(value), VALUE_LIMIT - 1,
    )  # fmt: skip
    return f"(vector,(0,{len(nodes)},1))"


def environment(rank: int, world_size: int, fd: int) -> dict[str, str]:
    """What a process must find in its environment to become this rank at MPI_Init.

    Args:
        rank, world_size: Which rank of how many the process is to be.
        fd: The rank's end of a stream socket pair, open and inheritable in the rank's process.

    Returns:
        The variables to add, or to replace: a Spark executor may itself have been started by Slurm or by mpiexec.
    """
    return {
        "PMI_RANK": str(rank),
        "PMI_SIZE": str(world_size),
        "PMI_FD": str(fd),
        # Left over from an outer launcher, these would turn the rank to PMI-2 or PMIx, or make it look for a parent.
        "PMI_SPAWNED": "0",
        "MPIR_CVAR_PMI_VERSION": "1",
    }
