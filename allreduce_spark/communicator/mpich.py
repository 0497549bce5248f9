"""What MPICH needs from outside a rank's process, and what it leaves behind there. Standard library only.

An agent, which must never load MPI itself, prepares its rank with `mpi_environment`, and clears up after a killed one
with `shared_memory_segments`.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["mpi_environment", "shared_memory_segments"]


def mpi_environment(interface: str | None, given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that make MPICH talk by TCP over one network interface (and by shared memory within a host).

    TCP because it works everywhere. One interface because with an unroutable bridge such as docker0 among them
    libfabric hangs in MPI_Init and UCX aborts. Within a host MPICH lets ranks read each other's memory, and where the kernel
    refuses that, as it does under the system call filters of many containers, the sums of MPICH 5.0.2 are wrong without an
    error: there the ranks copy through shared memory instead.

    Args:
        interface: Such as `eth0`: the one whose address is the source of a connection to the driver. None leaves the
            choice to MPICH.
        given: What is set already and therefore stays: whoever has a faster network knows better.

    Returns:
        The variables to add.
    """
    wanted = {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp"}
    if interface:
        wanted |= {"FI_TCP_IFACE": interface, "UCX_NET_DEVICES": interface}
    if not _may_read_other_processes():
        wanted["MPIR_CVAR_CH4_CMA_ENABLE"] = "0"
    return {name: value for name, value in wanted.items() if name not in given}


def _may_read_other_processes() -> bool:
    """Whether the kernel lets this process read memory of another one of the same user (Cross Memory Attach).

    The parent is asked for a byte at address 0, where nothing is: EFAULT says that all but the address was right. A look
    into /proc would not do: it shows Yama's setting, but no filter of system calls.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    iovec = (ctypes.c_size_t * 2)(0, 1)  # (address, bytes)
    libc.process_vm_readv(os.getppid(), iovec, ctypes.c_ulong(1), iovec, ctypes.c_ulong(1), ctypes.c_ulong(0))
    return ctypes.get_errno() == errno.EFAULT


def shared_memory_segments(pid: int) -> set[str]:
    """The paths of the MPICH shared-memory segments that process `pid` maps now, `/dev/shm/mpich_shm_<hash>_<node>`.

    Ask before the process is killed: afterwards nobody knows which segments were its own. `open_mpi` unlinks them once
    all ranks have mapped them, so there are some only while a group starts; a rank killed just then leaves them behind.

    Returns:
        Empty where there are none, the process is gone, or it belongs to somebody else.
    """
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(errors="replace")
    except OSError:
        return set()
    # 7ff8070c7000-7ff8072cd000 rw-s 00000000 00:1b 10     /dev/shm/mpich_shm_b0266e92_0
    # An unlinked segment is listed with ' (deleted)' after its path, so it is not the last word of the line.
    paths = (line.rsplit(maxsplit=1)[-1] for line in maps.splitlines() if "/dev/shm/mpich_" in line)
    return {path for path in paths if path.startswith("/dev/shm/mpich_")}
