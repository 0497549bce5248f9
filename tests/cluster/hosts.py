"""Hosts that are really namespaces of this machine: each with a name, a hosts file, shared memory and a network of its own.

A host is one process that holds a network, a UTS, an IPC and a mount namespace, and does nothing else; others enter it
(`Host.enter`). The file system and the process ids are those of this machine. Hosts are cabled to bridges in a further
network namespace, the switch, where no firewall of this machine reaches, and no name is made in the machine's own namespaces:
so all is gone with the last process in them, and none outlives the process that made them, even if that is killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Host", "Network", "add_unroutable_bridge", "limit_rate", "running_hosts", "why_no_hosts"]

TOOLS = ("ip", "mount", "nsenter", "setpriv", "tc", "unshare")
NAMESPACES = ("--net", "--uts", "--ipc", "--mount")
# With the parent's death the child is killed; it is the thread that calls which counts, and here that is the main one.
UNTIL_WE_END = ("setpriv", "--pdeathsig", "KILL")
# /sys shows the network namespace in which it was mounted. The last words wait for a signal.
BECOME_HOST = """
hostname "$1" && mount -t sysfs sysfs /sys && mount -t tmpfs -o mode=1777 tmpfs /dev/shm && mount --bind "$2" /etc/hosts &&
echo 0 > /proc/sys/net/ipv6/conf/default/accept_dad && ip link set lo up && echo ready && exec sleep infinity
"""


@dataclass(frozen=True)
class Network:
    """One more interface of each host.

    Attributes:
        interface: Its name on all hosts.
        prefix: Of the addresses, to which the host's number is added, from 1: "10.0.0." or "fd00:1::".
        leads: Whether it leads to the other hosts. One that does not is up, too, and has an address.
    """

    interface: str
    prefix: str
    leads: bool = True

    def address(self, number: int) -> str:
        return f"{self.prefix}{number}"


@dataclass(frozen=True)
class Host:
    """One host.

    Attributes:
        name: What it calls itself.
        addresses: By interface.
        ports: By interface, the switch's end of the cable, for who wants to pull it.
        enter: Words before a command that is to run on this host; it is killed when the process ends that starts it.
        on_switch: The same, for the switch.
    """

    name: str
    addresses: dict[str, str]
    ports: dict[str, str]
    enter: tuple[str, ...]
    on_switch: tuple[str, ...]


def why_no_hosts() -> str | None:
    """Why this machine cannot have such hosts; None where it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} is missing (apt-get install iproute2 util-linux)"
    tried = subprocess.run(["unshare", *NAMESPACES, "true"], capture_output=True, text=True, check=False)
    return f"no namespaces can be made here: {tried.stderr.strip()}" if tried.returncode else None


@contextlib.contextmanager
def running_hosts(folder: Path, names: Sequence[str], networks: Sequence[Network]) -> Iterator[tuple[Host, ...]]:
    """Make a host of each name, all on the same networks; two may have the same name.

    As on a Debian machine, a host's own name means 127.0.1.1 to it: who announces the address of that is not found.

    Args:
        folder: For the hosts files.
    """
    with contextlib.ExitStack() as stack:
        on_switch = _words_to_enter(stack.enter_context(_namespaces(folder, "switch", 0)))
        for network in networks:
            if network.leads:
                _run(*on_switch, "ip", "link", "add", network.interface, "type", "bridge")
                _run(*on_switch, "ip", "link", "set", network.interface, "up")
        hosts = []
        for number, name in enumerate(names, 1):
            pid = stack.enter_context(_namespaces(folder, name, number))
            addresses = {network.interface: network.address(number) for network in networks}
            ports = {network.interface: f"{network.interface}-{number}" for network in networks}
            hosts.append(Host(name, addresses, ports, _words_to_enter(pid), on_switch))
            for network in networks:
                _connect(hosts[-1], network, pid)
        yield tuple(hosts)


def add_unroutable_bridge(host: Host, name: str = "docker0", address: str = "172.17.0.1/16") -> None:
    """What Docker leaves on each host: a bridge that is up, with the same address everywhere, and leads nowhere."""
    _run(*host.enter, "ip", "link", "add", name, "type", "bridge")
    _run(*host.enter, "ip", "address", "add", address, "dev", name)
    _run(*host.enter, "ip", "link", "set", name, "up")


def limit_rate(host: Host, interface: str, mbit: float, *, burst_kb: int = 128) -> None:
    """Let a host neither send nor receive faster than that, by the token bucket filter of the kernel."""
    rate = ("root", "tbf", "rate", f"{mbit}mbit", "burst", f"{burst_kb}kb", "latency", "200ms")
    _run(*host.enter, "tc", "qdisc", "replace", "dev", interface, *rate)
    _run(*host.on_switch, "tc", "qdisc", "replace", "dev", host.ports[interface], *rate)


def _connect(host: Host, network: Network, pid: int) -> None:
    """Lay a cable from the switch to the host whose namespaces process `pid` holds."""
    interface, address, port = network.interface, host.addresses[network.interface], host.ports[network.interface]
    cable = ("type", "veth", "peer", "name", interface, "netns", str(pid))
    _run(*host.on_switch, "ip", "link", "add", port, *cable)
    _run(*host.on_switch, "ip", "link", "set", port, *(("master", interface) if network.leads else ()), "up")
    own = (f"{address}/64", "nodad") if ":" in address else (f"{address}/24",)
    _run(*host.enter, "ip", "address", "add", *own, "dev", interface)
    _run(*host.enter, "ip", "link", "set", interface, "up")


def _words_to_enter(pid: int) -> tuple[str, ...]:
    return (*UNTIL_WE_END, "nsenter", "--target", str(pid), *NAMESPACES, "--wd", "--")


@contextlib.contextmanager
def _namespaces(folder: Path, name: str, number: int) -> Iterator[int]:
    """The pid of a process with namespaces of its own; at the end all processes in them are killed."""
    hosts_file = folder / f"hosts-{number}"
    hosts_file.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n::1 localhost ip6-localhost\n")
    command = [*UNTIL_WE_END, "unshare", *NAMESPACES, "sh", "-c", BECOME_HOST, "sh", name, str(hosts_file)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, cwd=folder) as holder:
        assert holder.stdout is not None
        if holder.stdout.readline() != b"ready\n":
            raise OSError(f"the namespaces of {name} could not be made")
        own_network = _network_of(Path(f"/proc/{holder.pid}"))
        try:
            yield holder.pid
        finally:
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):  # It has ended.
                    if _network_of(process) == own_network:
                        os.kill(int(process.name), signal.SIGKILL)


def _network_of(process: Path) -> int:
    """Number of its network namespace."""
    return (process / "ns" / "net").stat().st_ino


def _run(*command: str) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise OSError(f"{' '.join(command)}: {ended.stderr.strip()}")
