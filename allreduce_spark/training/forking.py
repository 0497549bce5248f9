"""Ranks forked from a process that has imported Keras and what Keras computes with: a rank starts in tenths of a second then.

The agent asks for a rank with a `Request`; `fork_ranks` answers it. Forking a process that has threads is safe only if none
of them can hold a lock which the child needs. Seen with TensorFlow 2.21, Keras 3.15, numpy 2.4, scipy 1.17 and pyarrow 26:

* After the imports there are three threads beside the main one, all asleep: one of OpenBLAS in numpy and one in scipy (none
  where a rank has one core), and jemalloc's in pyarrow. Both libraries register `pthread_atfork` handlers: OpenBLAS ends its
  threads before the fork and starts them again where they are needed, jemalloc holds its locks across it.
* TensorFlow itself starts no thread before its first operation, when it also initialises the GPUs (not seen on one yet). So
  nothing but imports may happen before the fork; the number of threads and the GPUs are set up in the rank.
* The same holds of JAX 0.10 and PyTorch 2.13. JAX warns of a fork only where it has computed before.
* mpi4py must not be imported before: loading libmpi starts a thread (`async`), and no fork takes that along.

400 ranks forked on 2 cores, 200 of them with two threads each, that loaded a model, fitted a step and used OpenBLAS and
Arrow's threads: all ended in peace with the same loss. From the request to a loaded model took 0.19 s (median; 0.44 at most),
where a process of its own took 3.6 s.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import sys
import warnings
from dataclasses import dataclass

__all__ = ["Request", "die_with", "exit_code_from", "fork_ranks"]

PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15
REQUEST_BYTES = 1024
EXIT_CODE_BYTES = 4


@dataclass(frozen=True)
class Request:
    """What the agent sends to have a rank forked: a packet, and open file descriptors with it.

    Attributes:
        rank, num_ranks: Which rank of how many.
        channel: The rank's end of its channel to the agent.
        pmi: Its end of the PMI connection.
        output: Where it prints to; write end of a pipe.
        lifeline: A socket that ties the rank to the agent's interest in it. Its pid comes out of it, as text, together with
            its pidfd: nobody else can have got that pid, because it is not reaped before. Once the agent closes its end,
            the rank is killed, or not forked at all.
        ending: Write end of a pipe. The rank's exit code comes out of it (`exit_code_from`) once the rank has been reaped,
            or only the end of the file, if the process that forks has died.
    """

    rank: int
    num_ranks: int
    channel: int
    pmi: int
    output: int
    lifeline: int
    ending: int

    def send(self, control: socket.socket) -> None:
        """Send it through a SOCK_SEQPACKET socket; the sender keeps its own copies of the descriptors, and should close them.

        Raises:
            ConnectionError: The other end is gone.
        """
        descriptors = [self.channel, self.pmi, self.output, self.lifeline, self.ending]
        socket.send_fds(control, [json.dumps([self.rank, self.num_ranks]).encode()], descriptors)

    @classmethod
    def receive(cls, control: socket.socket) -> Request | None:
        """The next request, with the descriptors as this process knows them; None if there will be no more."""
        packet, descriptors, _, _ = socket.recv_fds(control, REQUEST_BYTES, 5)
        if not packet:
            return None
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        return cls(*json.loads(packet), *descriptors)


@dataclass(frozen=True)
class _Child:
    """A rank, seen from the process that forked it."""

    pid: int
    pidfd: int
    lifeline: int
    ending: int

    def end(self) -> None:
        """Kill it if it still runs, reap it, and tell the agent how it ended."""
        os.kill(self.pid, signal.SIGKILL)  # Not reaped yet, so the pid is still its own.
        _, status = os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        with contextlib.suppress(BrokenPipeError):  # Nobody wants to know any more.
            os.write(self.ending, code.to_bytes(EXIT_CODE_BYTES, "little", signed=True))
        self.let_go()

    def let_go(self) -> None:
        for descriptor in (self.pidfd, self.lifeline, self.ending):
            os.close(descriptor)


def fork_ranks(control: socket.socket) -> Request:
    """Fork a rank for each request. Returns in the ranks alone; the process that forks ends when `control` is closed.

    Must be called in the main thread: for the kernel a rank's parent is the thread that forked it.

    Args:
        control: SOCK_SEQPACKET, with the agent at its other end.

    Returns:
        What this rank was asked to be; only descriptors of its own are still open. Stdout and stderr are its `output`.
    """
    children: list[_Child] = []
    while True:
        poll = select.poll()
        poll.register(control, select.POLLIN)
        for child in children:
            poll.register(child.pidfd, select.POLLIN)
            poll.register(child.lifeline, 0)  # that the other end has been closed is always told
        events = dict(poll.poll())
        for child in [child for child in children if child.pidfd in events or child.lifeline in events]:
            children.remove(child)
            child.end()
        if control.fileno() not in events:
            continue
        request = Request.receive(control)
        if request is None:
            for child in children:
                child.end()
            os._exit(0)
        if _is_closed(request.lifeline):
            _close(request)
            continue
        forked = _fork(request)
        if forked is None:
            for child in children:
                child.let_go()
            control.close()
            return request
        children.append(forked)


def exit_code_from(ending: bytes) -> int:
    """What came out of `Request.ending`, as `subprocess` would say it: negative for a signal."""
    return int.from_bytes(ending, "little", signed=True)


def die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent dies, whatever the parent dies of."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # It died before we asked.


def _fork(request: Request) -> _Child | None:
    """Fork one rank; None in the rank."""
    parent = os.getpid()
    # The rank's from here on. Should the fork fail, for want of memory, say, the reason is read there, too.
    _print_to(request.output)
    with warnings.catch_warnings():
        # Python 3.12 warns of any fork of a process with threads. Ours are known: see the top of this file.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        die_with(parent)
        _prctl(PR_SET_NAME, f"rank {request.rank}".encode())
        for descriptor in (request.output, request.lifeline, request.ending):
            os.close(descriptor)
        return None
    silence = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    _print_to(silence)
    os.close(silence)
    for descriptor in (request.channel, request.pmi, request.output):
        os.close(descriptor)
    child = _Child(pid, os.pidfd_open(pid), request.lifeline, request.ending)
    with socket.socket(fileno=os.dup(child.lifeline)) as lifeline, contextlib.suppress(BrokenPipeError):
        socket.send_fds(lifeline, [str(pid).encode()], [child.pidfd])
    return child


def _print_to(descriptor: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def _is_closed(lifeline: int) -> bool:
    poll = select.poll()
    poll.register(lifeline, 0)
    return bool(poll.poll(0))


def _close(request: Request) -> None:
    for descriptor in (request.channel, request.pmi, request.output, request.lifeline, request.ending):
        os.close(descriptor)


def _prctl(option: int, argument: int | bytes) -> None:
    ctypes.CDLL(None).prctl(option, argument)
