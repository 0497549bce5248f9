"""Those who come to the driver's door in a process of their own: a crowd without the key, and then an agent that holds it.

Started by `test_gate.py` with the port, the number of strangers, and how many of them hold on at once; the key comes through
standard input. Says a line before the crowd comes, one when all of it has come, and one once the agent was understood.
"""

from __future__ import annotations

import socket
import sys
from collections import deque

from allreduce_spark.rendezvous import handshake
from allreduce_spark.rendezvous.client import Connection

WORDS = [b"", handshake.MAGIC, b"GET / HTTP/1.1\r\n\r\n" + bytes(1000), bytes(handshake.ANSWER_BYTES)]


def main() -> None:
    port, strangers, at_once = map(int, sys.argv[1:])
    key = bytes.fromhex(sys.stdin.readline())
    say("the crowd comes")
    sys.stdin.readline()
    crowd: deque[socket.socket] = deque()
    for number in range(strangers):
        crowd.append(socket.create_connection(("127.0.0.1", port), timeout=60))
        try:
            crowd[-1].sendall(WORDS[number % len(WORDS)])
        except ConnectionError:
            pass  # It was sent away already.
        if len(crowd) > at_once:
            crowd.popleft().close()
    say("the crowd is there")
    agent = Connection(("127.0.0.1", port), key)
    agent.send("say", word="I hold the key")
    say(agent.receive(60).fields["word"])
    agent.close()


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
