"""The key of a fit is in the memory of driver and agents, and nowhere else: in no text, no log, no process list."""

from __future__ import annotations

import contextlib
import logging
import pickle
import subprocess
import sys
import traceback
from dataclasses import fields

import pytest

from allreduce_spark.config import Timeouts
from allreduce_spark.errors import RendezvousError
from allreduce_spark.launch.agent import AgentTask
from allreduce_spark.rendezvous import handshake
from allreduce_spark.rendezvous.client import Connection
from allreduce_spark.rendezvous.controller import Hooks
from allreduce_spark.rendezvous.gate import Gate
from allreduce_spark.rendezvous.handshake import Answer, SessionCipher, challenge, check_answer
from allreduce_spark.rendezvous.protocol import Codec
from allreduce_spark.rendezvous.server import Rendezvous

KEY = bytes(range(100, 132))
NONCE = bytes(handshake.NONCE_BYTES)


def test_no_object_shows_the_key_when_it_is_printed(shows_key):
    answer = Answer(KEY, challenge(NONCE))
    reply, codec = check_answer(KEY, NONCE, answer.data)
    rendezvous = Rendezvous(1, KEY, Timeouts(), Hooks(lambda joins: {}))
    things = [
        answer,
        codec,
        answer.check(reply),
        SessionCipher(KEY, KEY),
        Gate(KEY, 1, print),
        rendezvous,
        Codec(),
    ]
    rendezvous.close()
    assert {task_field.name: task_field.repr for task_field in fields(AgentTask)}["key"] is False
    assert [thing for thing in things if shows_key(KEY, repr(thing)) or shows_key(KEY, str(thing))] == []


def test_nothing_that_is_sent_shows_the_key(shows_key):
    answer = Answer(KEY, challenge(NONCE))
    reply, _ = check_answer(KEY, NONCE, answer.data)
    assert not shows_key(KEY, challenge(NONCE) + answer.data + reply)


def test_no_error_and_no_log_of_a_failed_meeting_shows_the_key(meet, caplog, shows_key):
    caplog.set_level(logging.DEBUG)
    meeting = meet(1)
    with pytest.raises(RendezvousError) as caught:
        Connection(meeting.address, KEY, Timeouts(start_s=0.2))
    meeting.close()
    assert "refused a connection" in caplog.text
    for key in (KEY, b"k" * 32):  # the wrong one, and the one that the rendezvous holds
        assert not shows_key(key, caplog.text)
        assert not shows_key(key, "".join(traceback.format_exception(caught.value)))


def test_keys_of_a_connection_cannot_be_pickled_by_accident():
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(SessionCipher(KEY, KEY))


def test_what_other_users_see_of_a_process_that_holds_the_key_does_not_show_it(meet, process_shows_key):
    meeting = meet(1)
    code = (
        "import sys\n"
        "from allreduce_spark.rendezvous.client import Connection\n"
        "connection = Connection(('127.0.0.1', int(sys.argv[1])), bytes.fromhex(sys.stdin.readline()))\n"
        "sys.stdout.write('connected\\n'); sys.stdout.flush()\n"
        "sys.stdin.readline()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(meeting.address[1])], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        process.stdin.write((b"k" * 32).hex() + "\n")
        process.stdin.flush()
        assert process.stdout.readline() == "connected\n"
        assert not process_shows_key(b"k" * 32, process.pid)
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


def test_a_key_in_an_environment_or_a_command_line_would_be_found(process_shows_key):
    for arguments, environment in (([KEY.hex()], {}), ([], {"KEY": KEY.hex()})):
        with subprocess.Popen(
            [sys.executable, "-c", "print(flush=True); input()", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        ) as process:
            process.stdout.readline()
            assert process_shows_key(KEY, process.pid)
            process.stdin.close()
