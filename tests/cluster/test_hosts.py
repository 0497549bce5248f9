"""Several hosts: namespaces of this machine, each with its own name, shared memory and interfaces, not all of which lead on.

On each cluster one driver fits by every backend (`hosts_program`), and the tests look at what came of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hosts_program
import numpy as np
import pytest
from hosts import Host, Network, add_unroutable_bridge, limit_rate, running_hosts, why_no_hosts
from standalone import Seat, running_standalone

from allreduce_spark.communicator.horovod_environment import installed
from allreduce_spark.world import worlds_of

# The first test of each cluster waits for all of its fits.
pytestmark = [pytest.mark.spark, pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

PROGRAM = Path(__file__).with_name("hosts_program.py")
RUN_S = 400.0
BACKENDS = ["mpi", "horovod", "horovod-mpi"]
CHATTER_BYTES = 20_000  # of ARP and IPv6's neighbour discovery, in a minute


@dataclass(frozen=True)
class Fits:
    """What came of the fits on one cluster.

    Attributes:
        folder: Where the driver left it.
        output: What the driver printed.
        num_ranks: How many ranks each fit had.
    """

    folder: Path
    output: str
    num_ranks: int

    def weights(self, backend: str) -> list[np.ndarray]:
        if backend != "mpi" and installed() is None:
            pytest.skip("Horovod is not installed: allreduce-spark install-horovod")
        file = self.folder / f"{backend}.npz"
        assert file.exists(), self.output
        with np.load(file) as arrays:
            return [arrays[name] for name in arrays.files]

    def ranks(self, backend: str) -> list[dict[str, Any]]:
        """What each rank saw, in rank order."""
        return [json.loads((self.folder / f"{backend}-{rank}.json").read_text()) for rank in range(self.num_ranks)]


@pytest.fixture(scope="session")
def machine_with_hosts(java: None) -> None:
    if reason := why_no_hosts():
        pytest.skip(reason)


def fits_on(folder: Path, hosts: tuple[Host, ...], interface: str, cores: list[int]) -> Fits:
    """Bring up Spark, master and driver on the first host and a worker with so many cores on each other; run the driver."""
    environment = {**os.environ, "SPARK_LOCAL_DIRS": str(folder / "local"), "PYSPARK_PYTHON": sys.executable}
    form = "{}"
    if ":" in hosts[0].addresses[interface]:
        form = "[{}]"  # as Spark wants it
        environment["SPARK_PREFER_IPV6"] = "true"
        environment["JAVA_TOOL_OPTIONS"] += " -Djava.net.preferIPv6Addresses=true"
    driver, *workers = (
        Seat(f"seat-{number}", form.format(host.addresses[interface]), count, host.enter)
        for number, (host, count) in enumerate(zip(hosts, [0, *cores], strict=True))
    )
    with running_standalone(folder, environment, driver, workers) as cluster:
        wish = {
            "master": cluster.url,
            "conf": {"spark.driver.host": driver.address, "spark.driver.bindAddress": driver.address},
            "num_ranks": sum(cores),
            "backends": BACKENDS if installed() else BACKENDS[:1],
        }
        (folder / "wish.json").write_text(json.dumps(wish))
        with (folder / "driver.log").open("wb") as log:
            process = subprocess.Popen(
                [*driver.prefix, sys.executable, str(PROGRAM), str(folder)],
                env={**environment, "SPARK_LOCAL_IP": driver.address, "SPARK_CONF_DIR": str(folder)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):  # Then there is no outcome, and the output says why.
                process.wait(RUN_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Fits(folder, (folder / "driver.log").read_text(errors="replace"), sum(cores))


def check(fits: Fits, backend: str, expected: list[np.ndarray], interface: str) -> None:
    """The weights are right, each rank knows its place, and the gradients went over the interface that leads to the driver."""
    weights, ranks = fits.weights(backend), fits.ranks(backend)
    for ours, theirs in zip(weights, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    for world, seen in zip(worlds_of([rank["host"] for rank in ranks]), ranks, strict=True):
        assert seen["place"] == {name: getattr(world, name) for name in seen["place"]}, (world, seen)
        # To know the sum a host must hear at least as much from the others as there is to sum.
        least = hosts_program.STEPS * sum(array.nbytes for array in expected)
        received = dict(seen["received"])
        assert received.pop(interface) > least, (received, least)
        del received["lo"]
        assert all(count < CHATTER_BYTES for count in received.values()), received


@pytest.fixture(scope="module")
def expected() -> list[np.ndarray]:
    """The weights of one process that trains on all the rows."""
    model = hosts_program.compiled()
    rows = len(hosts_program.X)
    model.fit(hosts_program.X, hosts_program.Y, epochs=hosts_program.STEPS, batch_size=rows, shuffle=False, verbose=0)
    return model.get_weights()


@pytest.fixture(scope="module")
def fits_over_ipv6(machine_with_hosts: None, tmp_path_factory: pytest.TempPathFactory) -> Fits:
    """Two workers that are both called "worker", and reach the driver over IPv6. The first interface of all leads nowhere."""
    folder = tmp_path_factory.mktemp("hosts")
    networks = [Network("eth0", "10.213.96.", leads=False), Network("eth1", "fd00:213:97::")]
    with running_hosts(folder, ["driver", "worker", "worker"], networks) as hosts:
        return fits_on(folder, hosts, "eth1", [1, 1])


@pytest.fixture(scope="module")
def fits_on_shared_hosts(machine_with_hosts: None, tmp_path_factory: pytest.TempPathFactory) -> Fits:
    """Four workers, two of them with room for two ranks, and one with a slow link. Two networks lead from host to host, and
    Spark uses the second; another interface leads nowhere, nor does a bridge that has one address on all hosts.
    """
    folder = tmp_path_factory.mktemp("hosts")
    networks = [
        Network("eth0", "10.213.95.", leads=False),
        Network("eth1", "10.213.96."),
        Network("eth2", "10.213.97."),
    ]
    with running_hosts(folder, ["driver", "w1", "w2", "w3", "w4"], networks) as hosts:
        for host in hosts:
            add_unroutable_bridge(host)
        limit_rate(hosts[-1], "eth2", mbit=100)
        return fits_on(folder, hosts, "eth2", [2, 2, 1, 1])


@pytest.mark.support(place="namespaces")
@pytest.mark.parametrize("backend", BACKENDS)
def test_hosts_of_one_name_train_over_the_interface_that_leads_to_the_driver(
    fits_over_ipv6: Fits, expected: list[np.ndarray], backend: str
) -> None:
    check(fits_over_ipv6, backend, expected, "eth1")
    assert [rank["name"] for rank in fits_over_ipv6.ranks(backend)] == ["worker", "worker"]


@pytest.mark.support(place="namespaces")
@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_know_with_whom_they_share_a_host_and_wait_for_one_with_a_slow_link(
    fits_on_shared_hosts: Fits, expected: list[np.ndarray], backend: str
) -> None:
    check(fits_on_shared_hosts, backend, expected, "eth2")
    sizes = [rank["place"]["local_size"] for rank in fits_on_shared_hosts.ranks(backend)]
    assert sorted(sizes) == [1, 1, 2, 2, 2, 2]
