"""What an all-reduce of float32 numbers costs by each backend, and by TensorFlow's own: on one machine, and over a network.

Each side has processes of its own, and sums as training does: MPI numpy buffers, Horovod and TensorFlow tensors of a compiled
function (TensorFlow by the ring of MultiWorkerMirroredStrategy). The sides take turns, in rounds, so that a change of the
machine's mood hits them alike; those of Horovod, whose threads never rest, are stopped meanwhile. A round's time is that of the
slowest rank. The tables show medians over the rounds, and from quartile to quartile.

The network is one of four hosts that are namespaces of this machine (as root), each with a link of limited rate. No algorithm
beats `2(N-1)/N * bytes / rate` there; but a link lets the first 64 KB of a burst pass at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ranks import Place, ask_ranks, is_a_rank, join_group, talking_ranks
from table import print_table

from allreduce_spark.communicator.horovod_environment import installed

sys.path.insert(0, str(Path(__file__).parents[1] / "cluster"))
from hosts import Network, limit_rate, running_hosts, why_no_hosts

SIDES = {"mpi": "MPI", "horovod": "Horovod (Gloo)", "horovod-mpi": "Horovod (MPI)", "tensorflow": "TensorFlow"}
PORT = 27180  # of TensorFlow's servers, which must know each other's before they start
BURST_KB = 64
HOSTS = 4

Seconds = dict[str, list[float]]  # by side, of each round
Summing = Callable[[np.ndarray], Callable[[], np.ndarray]]  # what all-reduces a buffer, made once for many times


@dataclass(frozen=True)
class Size:
    """A buffer, and how long to look at it.

    Attributes:
        elements: Of float32.
        times: All-reduces per side and round.
        rounds: The first is thrown away: it compiles, and checks the sum.
    """

    elements: int
    times: int
    rounds: int


SIZES = {
    "4 KB": Size(1_000, 50, 12),
    "64 KB": Size(16_000, 20, 12),
    "1 MB": Size(250_000, 5, 12),
    "10 MB": Size(2_500_000, 1, 9),
    "100 MB": Size(25_000_000, 1, 5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--mbit", type=float, default=200.0, help="rate of each link of the network, in Mbit/s")
    parser.add_argument("--only", choices=["local", "network"], help="one of the two tables")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--servers", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if is_a_rank():
        be_rank(arguments.rank_of, arguments.servers)
        return
    sides = [side for side in arguments.sides if not side.startswith("horovod") or installed()]
    if arguments.only != "network":
        print("\n2 ranks on this machine", flush=True)
        servers = [f"127.0.0.1:{PORT + rank}" for rank in range(2)]
        for name, seconds in measure(sides, arguments.sizes, [Place()] * 2, servers):
            show(name, seconds, None)
    if arguments.only != "local":
        if reason := why_no_hosts():
            print(f"\nNo network: {reason}")
            return
        print(f"\n{HOSTS} ranks on {HOSTS} hosts with links of {arguments.mbit:g} Mbit/s", flush=True)
        for name, seconds in measure_on_network(sides, arguments.sizes, arguments.mbit):
            bits = 32 * SIZES[name].elements
            show(name, seconds, 2 * (HOSTS - 1) / HOSTS * bits / (arguments.mbit * 1e6))


# In the benchmark's own process.


def measure_on_network(sides: Sequence[str], sizes: Sequence[str], mbit: float) -> Iterator[tuple[str, Seconds]]:
    with tempfile.TemporaryDirectory(prefix="allreduce_spark-benchmark-") as folder:
        names = [f"host{number}" for number in range(HOSTS)]
        with running_hosts(Path(folder), names, [Network("eth0", "10.213.97.")]) as hosts:
            for host in hosts:
                limit_rate(host, "eth0", mbit, burst_kb=BURST_KB)
            places = [Place(node, "eth0", host.enter) for node, host in enumerate(hosts)]
            yield from measure(sides, sizes, places, [f"{host.addresses['eth0']}:{PORT}" for host in hosts])


def measure(
    sides: Sequence[str], sizes: Sequence[str], places: Sequence[Place], servers: Sequence[str]
) -> Iterator[tuple[str, Seconds]]:
    """Run all rounds of one size after the other, with a group of ranks for each side."""
    with contextlib.ExitStack() as stack:
        groups = {}
        for side in sides:
            arguments = ["--rank-of", side, "--servers", *servers]
            groups[side] = stack.enter_context(talking_ranks(__file__, places, arguments))
            ask_ranks(groups[side], None)  # They are there, all of them.
            let_horovod(signal.SIGSTOP, side, groups[side])
        for name in sizes:
            yield name, take_turns(groups, SIZES[name])


def take_turns(groups: dict[str, list[subprocess.Popen[bytes]]], size: Size) -> Seconds:
    seconds: Seconds = {side: [] for side in groups}
    for number in range(size.rounds):
        for side, ranks in groups.items():
            let_horovod(signal.SIGCONT, side, ranks)
            wish = {"elements": size.elements, "times": size.times, "check": number == 0}
            seconds[side].append(max(ask_ranks(ranks, wish)))
            let_horovod(signal.SIGSTOP, side, ranks)
    return {side: rounds[1:] for side, rounds in seconds.items()}


def let_horovod(signal_number: int, side: str, ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Stop the ranks of Horovod, or let them go on. Those of TensorFlow would miss each other, and MPI's sleep anyway."""
    for process in ranks if side.startswith("horovod") else ():
        process.send_signal(signal_number)


def show(name: str, seconds: Seconds, bound: float | None) -> None:
    """Print the milliseconds of an all-reduce, and how many times those of MPI the other sides took, round by round."""
    rows = []
    for side, rounds in seconds.items():
        median = statistics.median(rounds)
        low, _, high = statistics.quantiles(rounds, n=4)
        ratio = statistics.median(a / b for a, b in zip(rounds, seconds.get("mpi", rounds), strict=True))
        of_bound = [] if bound is None else [milliseconds(bound), f"{median / bound:.2f}"]
        quartiles = f"{milliseconds(low)} - {milliseconds(high)}"
        rows.append([SIDES[side], milliseconds(median), quartiles, f"{ratio:.2f}", *of_bound])
    print()
    print_table([name, "ms", "quartiles", "times MPI", *([] if bound is None else ["bound ms", "times bound"])], rows)


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g}" if seconds < 1 else f"{1000 * seconds:.0f}"


# In each rank.


def be_rank(side: str, servers: Sequence[str]) -> None:
    """Answer each wish with the seconds that one all-reduce took."""
    sums_of = tensorflow(servers) if side == "tensorflow" else ours(side)
    for line in sys.stdin:
        wish = json.loads(line)
        print(json.dumps(timed(sums_of, len(servers), **wish) if wish else "yes"), flush=True)


def timed(sums_of: Summing, num_ranks: int, *, elements: int, times: int, check: bool) -> float:
    if check:
        total = sums_of(np.ones(elements, np.float32))()
        if not (total == num_ranks).all():
            raise AssertionError(f"the sum of {num_ranks} ones is {total.min()} to {total.max()}")
    come_together, reduce = sums_of(np.zeros(1, np.float32)), sums_of(np.zeros(elements, np.float32))
    come_together()
    began_at = time.perf_counter()
    for _ in range(times):
        reduce()
    return (time.perf_counter() - began_at) / times


def ours(backend: str) -> Summing:
    """By our communicator: within a compiled function where the backend can, as numpy buffers where it cannot."""
    communicator = join_group(backend)
    if communicator.graph is None:

        def sums_of(buffer: np.ndarray) -> Callable[[], np.ndarray]:
            def reduce() -> np.ndarray:
                communicator.allreduce(buffer)
                return buffer

            return reduce

        return sums_of
    graph = communicator.graph
    return compiled(lambda tensor: graph.allreduce_sum([tensor])[0])


def tensorflow(servers: Sequence[str]) -> Summing:
    """By the collectives of TensorFlow, as MultiWorkerMirroredStrategy uses them."""
    place = {"cluster": {"worker": servers}, "task": {"type": "worker", "index": int(os.environ["PMI_RANK"])}}
    os.environ["TF_CONFIG"] = json.dumps(place)
    import tensorflow as tf

    options = tf.distribute.experimental.CommunicationOptions(
        implementation=tf.distribute.experimental.CommunicationImplementation.RING
    )
    strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)

    def reduce_replica(tensor: Any) -> Any:
        on_device = tf.identity(tensor)  # where this replica computes, which TensorFlow wants to know
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, on_device, options)

    return compiled(lambda tensor: strategy.run(reduce_replica, [tensor]))


def compiled(function: Callable[[Any], Any]) -> Summing:
    import tensorflow as tf  # not above: ranks of MPI need none

    run = tf.function(function)

    def sums_of(buffer: np.ndarray) -> Callable[[], np.ndarray]:
        tensor = tf.constant(buffer)
        return lambda: np.asarray(run(tensor))

    return sums_of


if __name__ == "__main__":
    main()
