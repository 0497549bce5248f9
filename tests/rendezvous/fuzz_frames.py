"""Random and mutated frames against the codec, the handshake and the driver's handlers: `make fuzz`, by hand.

    python tests/rendezvous/fuzz_frames.py --frames 1000000 --seed 0

The same seed makes the same frames. Four targets take turns, for what each kind of attacker can send:

    codec       what claims to be a frame, where nothing encrypts: a rank at its agent
    sealed      the same where frames are encrypted: somebody between agent and driver
    handshake   an answer to the driver, a challenge and a reply to an agent: a stranger
    handlers    well-formed messages that make no sense, in any order: an agent that has gone mad

The run fails where anything but a ProtocolError or an AuthenticationError comes out of the first three, where a handler of
the driver lets an error of its own show or leaves a fit without an outcome, and where memory grows.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import random
import sys
import time
import tracemalloc
import types
from collections import Counter
from collections.abc import AsyncIterator, Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from allreduce_spark.config import Timeouts
from allreduce_spark.errors import AuthenticationError, ProtocolError
from allreduce_spark.rendezvous import handshake
from allreduce_spark.rendezvous.controller import Hooks
from allreduce_spark.rendezvous.handshake import Answer, SessionCipher, challenge, check_answer
from allreduce_spark.rendezvous.protocol import Codec, Message, Phase
from allreduce_spark.rendezvous.recovery import Restarts
from allreduce_spark.rendezvous.server import Rendezvous

KEY = b"k" * 32
KINDS = [
    "hello", "heartbeat", "join", "pmi", "log", "progress", "result", "failed", "done", "saved", "save_failed", "stack",
    "abort",
]  # fmt: skip
NAMES = [
    "rank", "host", "host_key", "phase", "epoch", "step", "rows", "validation_rows", "spec", "line", "error", "cause",
    "log_tail", "consequence", "generation", "kind", "shards", "saved", "id", "file", "bytes", "checksum", "logs",
    "regroups", "shard", "is_waiting", "waited_s", "agent", "message", "self", "gpus", "nccl",
]  # fmt: skip
LINES = [
    "cmd=init pmi_version=1 pmi_subversion=1",
    "cmd=get_maxes",
    "cmd=put kvsname=n key=k value=v",
    "cmd=get kvsname=n key=k",
    "cmd=barrier_in",
    "cmd=finalize",
    "cmd=abort exitcode=1",
    "cmd=",
    "mcmd=spawn",
]
MESSAGES_PER_FIT = 60
BATCH = 1000
GROWTH_BYTES = 32 << 20


@dataclass
class Fuzz:
    """One run: where its chances come from, and what came of them."""

    rng: random.Random
    outcomes: Counter[str] = field(default_factory=Counter)

    def note(self, target: str, outcome: str, count: int = 1) -> None:
        self.outcomes[f"{target}: {outcome}"] += count


def value(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON value, and more often one that is at the border of something."""
    choices: list[Callable[[], Any]] = [
        lambda: rng.choice([None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, 0.5, float("inf"), float("nan")]),
        lambda: rng.choice(["", "x", "\ud800", "\0", "x" * 3000, "train", *LINES, *(phase.value for phase in Phase)]),
        lambda: rng.randrange(-4, 4),
        lambda: rng.choice(list(Phase)).value,
    ]
    if depth < 2:
        choices += [
            lambda: [value(rng, depth + 1) for _ in range(rng.randrange(4))],
            lambda: {rng.choice(NAMES): value(rng, depth + 1) for _ in range(rng.randrange(4))},
        ]
    return rng.choice(choices)()


def sensible(rng: random.Random, kind: str) -> dict[str, Any]:
    """The fields that a message of this kind should have."""
    place = {"phase": rng.choice(list(Phase)).value, "epoch": rng.randrange(3), "step": rng.randrange(9)}
    match kind:
        case "hello":
            return {"rank": rng.randrange(2), "host": "host"}
        case "heartbeat":
            return {**place, "is_waiting": rng.random() < 0.5, "waited_s": rng.random()}
        case "join":
            shard = {"shard": 0, "rows": 1, "validation_rows": 0, "spec": None, "validation_spec": None}
            if rng.random() < 0.1:
                shard[rng.choice(list(shard))] = value(rng)
            shards, saved = [shard] * rng.randrange(3), ["000001-00000000"]
            return {"host_key": "a", "shards": shards, "saved": saved, "gpus": ["0"], "nccl": True}
        case "pmi":
            return {"line": rng.choice(LINES)}
        case "failed":
            return {"error": "ValueError", "cause": "no", "log_tail": ["line"], **place}
    return {}


def message(rng: random.Random, madness: float = 0.5) -> Message:
    """One that makes sense, but for a share `madness`: there something is too much, missing or of another type."""
    kind = rng.choice(KINDS)
    fields = sensible(rng, kind)
    while rng.random() < madness:
        fields[rng.choice([*fields, *NAMES])] = value(rng)
        if rng.random() < 0.3:
            del fields[rng.choice(list(fields))]
    fields.pop("kind", None)
    body = rng.randbytes(rng.randrange(50)) if rng.random() < 0.2 else b""
    return Message(kind if rng.random() > madness / 10 else rng.choice(["", "x", "\ud800"]), fields, body)


def mutated(rng: random.Random, data: bytes) -> bytes:
    """The same bytes after a few accidents."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        place = rng.randrange(len(changed) + 1)
        match rng.randrange(7):
            case 0 if changed:
                changed[place % len(changed)] ^= 1 << rng.randrange(8)
            case 1:
                changed[place:place] = rng.randbytes(rng.randrange(1, 9))
            case 2:
                del changed[place : place + rng.randrange(1, 9)]
            case 3:
                del changed[place:]
            case 4:
                changed[place:place] = changed[: rng.randrange(len(changed) + 1)]
            case 5:
                changed[:4] = rng.choice([0, 1, len(changed), 2**20, 2**20 + 1, 2**31, 2**32 - 1]).to_bytes(4, "big")
            case 6:
                changed[4:8] = rng.choice([0, 1, len(changed), 2**22, 2**22 + 1, 2**32 - 1]).to_bytes(4, "big")
    return bytes(changed)


def feed(rng: random.Random, codec: Codec, data: bytes) -> str:
    """Give it to the codec in one piece or in several; say what came of it."""
    cut = rng.randrange(len(data) + 1)
    try:
        read = sum(len(list(codec.feed(piece))) for piece in (data[:cut], data[cut:]))
    except ProtocolError:
        return "refused"
    return "understood" if read else "waits for more"


def fuzz_codec(fuzz: Fuzz, count: int) -> None:
    for _ in range(count):
        frame = Codec().encode(message(fuzz.rng)) if fuzz.rng.random() < 0.9 else fuzz.rng.randbytes(60)
        if fuzz.rng.random() < 0.1:
            header = json.dumps(value(fuzz.rng)).encode()
            frame = len(header).to_bytes(4, "big") + bytes(4) + header
        fuzz.note("codec", feed(fuzz.rng, Codec(), mutated(fuzz.rng, frame)))


def fuzz_sealed(fuzz: Fuzz, count: int) -> None:
    keys = fuzz.rng.randbytes(32), fuzz.rng.randbytes(32)
    for _ in range(count):
        sender, receiver = Codec(SessionCipher(*keys)), Codec(SessionCipher(*reversed(keys)))
        frame = sender.encode(message(fuzz.rng))
        changed = mutated(fuzz.rng, frame)
        outcome = feed(fuzz.rng, receiver, changed)
        if outcome == "understood" and not changed.startswith(frame):
            raise AssertionError(f"a frame that was changed was understood: {frame!r} -> {changed!r}")
        fuzz.note("sealed", outcome)


def fuzz_handshake(fuzz: Fuzz, count: int) -> None:
    nonce = fuzz.rng.randbytes(handshake.NONCE_BYTES)
    answer = Answer(KEY, challenge(nonce))
    reply, _ = check_answer(KEY, nonce, answer.data)
    targets: list[tuple[bytes, Callable[[bytes], object]]] = [
        (answer.data, lambda data: check_answer(KEY, nonce, data)),
        (reply, answer.check),
        (challenge(nonce), lambda data: check_answer(KEY, nonce, Answer(KEY, data).data)),
    ]
    for _ in range(count):
        good, check = fuzz.rng.choice(targets)
        data = mutated(fuzz.rng, good) if fuzz.rng.random() < 0.8 else fuzz.rng.randbytes(len(good))
        try:
            check(data)
        except (ProtocolError, AuthenticationError):
            fuzz.note("handshake", "refused")
        else:
            if data != good:
                raise AssertionError(f"a changed message opened the door: {good!r} -> {data!r}")
            fuzz.note("handshake", "accepted, for it was not changed in the end")


@types.coroutine
def _let_others_speak() -> Generator[None, None, None]:
    yield


class MadAgent:
    """What the gate would give to the rendezvous for an agent that says anything."""

    def __init__(self, fuzz: Fuzz, count: int) -> None:
        self._fuzz, self._count = fuzz, count
        self._madness = fuzz.rng.choice([0.02, 0.5])
        self._agent, self._driver = Codec(), Codec()

    def send(self, kind: str, **fields: Any) -> None:
        self._driver.encode(Message(kind, fields))

    async def messages(self) -> AsyncIterator[Message]:
        for number in range(self._count):
            said = message(self._fuzz.rng, self._madness)
            if number < 2 and self._fuzz.rng.random() < 0.9:
                kind = ("hello", "join")[number]
                said = Message(kind, sensible(self._fuzz.rng, kind))
            await _let_others_speak()
            for heard in self._driver.feed(self._agent.encode(said)):
                self._fuzz.note("handlers", "heard")
                yield heard


def fuzz_handlers(fuzz: Fuzz, count: int) -> None:
    """Fits of one and of two ranks whose agents have gone mad, one after the other, until `count` messages were heard."""
    before = fuzz.outcomes["handlers: heard"]
    while fuzz.outcomes["handlers: heard"] - before < count:
        restarts = Restarts(fuzz.rng.choice([0, 3]))
        num_ranks = fuzz.rng.choice([1, 2])
        rendezvous = Rendezvous(num_ranks, KEY, Timeouts(), Hooks(lambda joins: {"spec": None}), restarts)
        agents = [MadAgent(fuzz, fuzz.rng.randrange(1, MESSAGES_PER_FIT)) for _ in range(num_ranks + 1)]
        talks = [rendezvous.attend(agent) for agent in agents]  # type: ignore[arg-type]
        while talks:
            talk = fuzz.rng.choice(talks)
            try:
                talk.send(None)  # These guests wait for nothing but their turn, so no loop needs to run.
            except StopIteration:
                talks.remove(talk)
        failure = rendezvous.failure
        if failure is not None and failure.cause.startswith("on the driver"):
            raise AssertionError(f"an error of the driver's own: {failure.cause}")
        if failure is not None and not failure.consequence and not rendezvous.wait(0):
            raise AssertionError(f"a fit has failed, and nobody is told: {failure}")
        fuzz.note("handlers", f"fits that {_outcome(rendezvous)}")
        rendezvous.close()


def _outcome(rendezvous: Rendezvous) -> str:
    if rendezvous.failure is not None:
        return f"ended with {rendezvous.failure.error[:30]!r}"
    return "ended well" if rendezvous.wait(0) else "went on"


TARGETS = [(fuzz_codec, 0.4), (fuzz_sealed, 0.3), (fuzz_handshake, 0.05), (fuzz_handlers, 0.25)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--trace", action="store_true", help="count what Python has allocated, too: several times slower"
    )
    arguments = parser.parse_args()
    logging.disable()
    fuzz = Fuzz(random.Random(arguments.seed))
    started = time.monotonic()
    _run(fuzz, min(arguments.frames // 10, 20_000))  # What is allocated once is there afterwards.
    if arguments.trace:
        tracemalloc.start()
        _run(fuzz, arguments.frames // 10)
    resident, traced = _memory()
    _run(fuzz, arguments.frames)
    growth, traced_growth = (after - before for after, before in zip(_memory(), (resident, traced), strict=True))
    for outcome, count in sorted(fuzz.outcomes.items()):
        sys.stdout.write(f"{count:>9}  {outcome}\n")
    sys.stdout.write(
        f"{arguments.frames} frames of seed {arguments.seed} in {time.monotonic() - started:.0f} s; memory grew by "
        f"{growth / 2**20:.1f} MiB, what Python allocated by {traced_growth / 2**20:.2f} MiB\n"
    )
    if growth > GROWTH_BYTES or traced_growth > GROWTH_BYTES // 32:
        raise SystemExit("memory grows")


def _run(fuzz: Fuzz, frames: int) -> None:
    """So many frames, in batches, so that no target's chances depend on how many there are in all."""
    left = frames
    while left > 0:
        for target, share in TARGETS:
            target(fuzz, max(1, int(share * min(left, BATCH))))
        left -= BATCH


def _memory() -> tuple[int, int]:
    """Bytes that are resident, and bytes that Python has allocated where that is traced."""
    gc.collect()
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident, tracemalloc.get_traced_memory()[0]


if __name__ == "__main__":
    main()
