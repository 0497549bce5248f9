"""What the ranks of these tests run in place of TensorFlow.

Python imports this file at its start, because it lies on the agent's import path, which its rank inherits. So the rank is the
real `python -m allreduce_spark.training`, but finds here what it imports next. The file `behaviour` in its folder, which came
to the agent with the task, names the function to be.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import types
from pathlib import Path


def run_rank(channel, folder, threads):
    from allreduce_spark.rendezvous.status import StatusPage

    status = StatusPage(folder / "status")
    name, _, argument = (folder / "behaviour").read_text().partition(" ")
    globals()[name](channel, folder, status, *([argument] if argument else []))


def start(channel, status):
    from allreduce_spark.rendezvous.protocol import Phase

    message = channel.receive(60)
    status.write(Phase.TRAIN, 2, 7)
    return message


def say(line):
    sys.stdout.write(line + "\n")


def finishes(channel, folder, status):
    from allreduce_spark.rendezvous.protocol import Phase

    world = start(channel, status).fields["membership"]["world"]
    if world["rank"] == 0:
        channel.send("progress", epoch=0, steps_done=1)
        (folder / "result").write_bytes(b"the result of the root")
    status.write(Phase.TEARDOWN)
    channel.send("done")


def survives(channel, folder, status, deaths):
    """Rank 1 dies in each generation before that one, in its first step or a step later each time; then all finish."""
    from allreduce_spark.rendezvous.protocol import Phase

    membership = start(channel, status).fields["membership"]
    generation, rank = membership["generation"], membership["world"]["rank"]
    say(f"generation {generation}")
    if generation < int(deaths):
        status.write(Phase.TRAIN, 2, 8 + generation)
        if rank == 0:
            (folder / "result").write_bytes(b"what nobody wants")
            time.sleep(600)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 0:
        (folder / "result").write_bytes(b"the result of the root")
    channel.send("done")


def always_fails(channel, folder, status):
    start(channel, status)
    raise ValueError("a label of 11")


def has_a_large_result(channel, folder, status, megabytes):
    from allreduce_spark.rendezvous.protocol import Phase

    (folder / "result").write_bytes(bytes(int(megabytes) << 20))
    start(channel, status)
    status.write(Phase.TEARDOWN)
    time.sleep(0.3)  # so that the driver has seen it
    channel.send("done")


def trains(channel, folder, status):
    start(channel, status)
    time.sleep(600)


def says_who_it_is(channel, folder, status):
    say(f"I am {os.environ['PMI_RANK']}")
    channel.send("me", rank=int(os.environ["PMI_RANK"]), size=os.environ["PMI_SIZE"], parent=os.getppid())


def draws_a_number(channel, folder, status):
    import random

    channel.send("drawn", number=random.random())


def writes_its_pid(channel, folder, status):
    (folder / "pid").write_text(str(os.getpid()))
    trains_and_ignores_signals(channel, folder, status)


def trains_and_ignores_signals(channel, folder, status):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    trains(channel, folder, status)


def writes_a_temporary_file(channel, folder, status):
    """As TensorFlow does; and os._exit leaves it where it is."""
    import tempfile

    start(channel, status)
    descriptor, path = tempfile.mkstemp(prefix="generated_", suffix=".py")
    os.write(descriptor, b"def generated(): ...")
    channel.send("progress", path=path)
    channel.send("done")


def dies(channel, folder, status):
    start(channel, status)
    for number in range(60):
        say(f"line {number}")
    sys.stdout.write("last words without an end")
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def exits(channel, folder, status, code):
    start(channel, status)
    say("about to exit")
    os._exit(int(code))


def exits_before_the_start(channel, folder, status):
    say("no TensorFlow here")
    os._exit(9)


def exits_at_first(channel, folder, status):
    """Once the shard is on disk, and before the ranks are let go; what is started in its place finishes."""
    mark = folder / "was here"
    if mark.exists():
        finishes(channel, folder, status)
        return
    mark.touch()
    time.sleep(1.5)
    os._exit(9)


def raises(channel, folder, status):
    start(channel, status)
    say("before the error")
    raise ValueError("a label of 11, but there are 10 classes ✗")


def loses_the_others(channel, folder, status):
    from allreduce_spark.errors import CollectiveError

    start(channel, status)
    raise CollectiveError("lost the others")


def dies_a_little_later(channel, folder, status):
    start(channel, status)
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)


def cannot_be_imported(channel, folder, status):
    raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")


def hangs_at_the_end(channel, folder, status):
    finishes(channel, folder, status)
    time.sleep(600)


def is_killed_at_the_end(channel, folder, status):
    finishes(channel, folder, status)
    os.kill(os.getpid(), signal.SIGSEGV)


def stops_in(channel, folder, status, phase):
    """All come to this phase; rank 1 is stopped there, and the others wait for it."""
    from allreduce_spark.rendezvous.protocol import Phase

    if phase != "import":
        start(channel, status)
    status.write_waiting(os.environ["PMI_RANK"] != "1", 0.0)
    status.write(Phase(phase))
    if os.environ["PMI_RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)


def stops_at_the_end(channel, folder, status):
    finishes(channel, folder, status)
    os.kill(os.getpid(), signal.SIGSTOP)


def prints_until_it_is_enough(channel, folder, status):
    start(channel, status)
    while not (folder / "enough").exists():
        sys.stdout.write("a line like all others\n" * 100)
    finish(channel, folder)


def closes_its_output(channel, folder, status):
    start(channel, status)
    os.close(1)
    os.close(2)
    time.sleep(600)


def prints_many_lines(channel, folder, status):
    start(channel, status)
    for number in range(200_000):
        sys.stdout.write(f"line {number}\n")
    finish(channel, folder)


def prints_a_line_without_end(channel, folder, status):
    start(channel, status)
    for _ in range(800):
        sys.stdout.write("━" * (1 << 14))
    finish(channel, folder)


def prints_bytes(channel, folder, status):
    start(channel, status)
    os.write(1, b"caf\xe9 \xff\xfe\x00\nnext\r\n")
    os.kill(os.getpid(), signal.SIGKILL)


def prints_before_it_is_started(channel, folder, status):
    for number in range(20_000):
        say(f"import warning {number}")
    finishes(channel, folder, status)


def leaves_a_child_behind(channel, folder, status):
    """The child keeps the rank's output open."""
    start(channel, status)
    if os.fork() == 0:
        time.sleep(600)
        os._exit(0)
    os._exit(4)


def finish(channel, folder):
    sys.stdout.flush()
    (folder / "result").write_bytes(b"printed")
    channel.send("done")


def babbles_into_its_channel(channel, folder, status):
    start(channel, status)
    channel._socket.sendall(b"\xff" * 100)
    time.sleep(600)


def speaks_mpi(channel, folder, status, segment):
    """PMI as MPI_Init speaks it, in small pieces; with shared memory that only a clean end would remove."""
    start(channel, status)
    pmi = socket.socket(fileno=int(os.environ["PMI_FD"]))
    rank = os.environ["PMI_RANK"]
    lines = pmi.makefile("r", newline="\n")

    def ask(text):
        for piece in (text[:5], text[5:], "\n"):
            pmi.sendall(piece.encode())
            time.sleep(0.02)
        return lines.readline().strip()

    name = ask("cmd=get_my_kvsname").rpartition("=")[2]
    assert ask(f"cmd=put kvsname={name} key=address-{rank} value=address of {rank}").startswith("cmd=put_result rc=0")
    memory = map_file(segment + rank)
    assert ask("cmd=barrier_in") == "cmd=barrier_out"
    other = 1 - int(rank)
    assert ask(f"cmd=get kvsname={name} key=address-{other}").endswith(f"value=address of {other}")
    say(f"met {memory}")
    if rank == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def aborts_mpi(channel, folder, status):
    start(channel, status)
    say("Fatal error in internal_Init")
    socket.socket(fileno=int(os.environ["PMI_FD"])).sendall(b"cmd=abort exitcode=15\n")
    os._exit(15)


def map_file(path):
    import mmap

    with open(path, "w+b") as file:
        file.write(bytes(4096))
        file.flush()
        return mmap.mmap(file.fileno(), 4096)


if "allreduce_spark.training" in sys.orig_argv:
    rank = types.ModuleType("allreduce_spark.training.rank")
    rank.run_rank = run_rank
    sys.modules[rank.__name__] = rank

    # Only the process that ranks are forked from comes here.
    folders = [word.partition("=")[2] for word in sys.orig_argv if word.startswith("--folder=")]
    files = [Path(folder, "behaviour") for folder in folders]
    if [file.read_text() for file in files if file.exists()] == ["stops_before_the_fork"]:
        os.kill(os.getpid(), signal.SIGSTOP)
