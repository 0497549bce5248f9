"""The PMI-1 words, asked and answered without a socket."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allreduce_spark.errors import ProtocolError, RankFailedError
from allreduce_spark.rendezvous import pmi
from allreduce_spark.rendezvous.pmi import (
    KEY_LIMIT,
    NAME_LIMIT,
    VALUE_LIMIT,
    KeySpace,
    environment,
    process_mapping,
)


@pytest.fixture
def key_space():
    return KeySpace("fit-1-generation-0", 2, process_mapping([0, 0]))


def only_reply(key_space, rank, line):
    ((to_rank, reply),) = key_space.answer(rank, line)
    assert to_rank == rank
    return reply


# The words


@pytest.mark.parametrize(
    ("said", "answered"),
    [
        ("cmd=init pmi_version=1 pmi_subversion=1", "cmd=response_to_init pmi_version=1 pmi_subversion=1 rc=0"),
        ("cmd=init pmi_version=2 pmi_subversion=0", "cmd=response_to_init pmi_version=1 pmi_subversion=1 rc=-1"),
        ("cmd=get_maxes", "cmd=maxes kvsname_max=256 keylen_max=64 vallen_max=1024"),
        ("cmd=get_appnum", "cmd=appnum appnum=0"),
        ("cmd=get_universe_size", "cmd=universe_size size=2"),
        ("cmd=get_my_kvsname", "cmd=my_kvsname kvsname=fit-1-generation-0"),
        ("cmd=finalize", "cmd=finalize_ack"),
        (
            "cmd=get kvsname=fit-1-generation-0 key=PMI_process_mapping\n",
            "cmd=get_result rc=0 msg=success value=(vector,(0,1,2))",
        ),
    ],
)
def test_every_word_of_mpi_init_has_its_answer(key_space, said, answered):
    assert key_space.answer(1, said) == [(1, answered)]


@pytest.mark.parametrize("said", ["cmd=publish_name service=s", "mcmd=spawn nprocs=1", "cmd=barrier_in group=0,1"])
def test_an_unknown_command_is_refused_and_not_an_end(key_space, said):
    assert "rc=-1" in only_reply(key_space, 0, said)
    assert only_reply(key_space, 0, "cmd=get_appnum") == "cmd=appnum appnum=0"


def test_abort_ends_the_generation_and_names_the_rank(key_space):
    with pytest.raises(RankFailedError, match="rank 1 failed first: called MPI_Abort with exit code 7") as raised:
        key_space.answer(1, "cmd=abort exitcode=7 message=abort")
    assert raised.value.rank == 1


@pytest.mark.parametrize("line", ["", "hello", "\x00\x01", "GET / HTTP/1.1"])
def test_a_line_that_is_no_pmi_is_a_protocol_error(key_space, line):
    with pytest.raises(ProtocolError, match="without 'cmd='"):
        key_space.answer(0, line)


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_of_another_group_is_a_protocol_error(key_space, rank):
    with pytest.raises(ProtocolError, match="ranks 0 to 1"):
        key_space.answer(rank, "cmd=get_appnum")


# The keys


@given(value=st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=200))
def test_what_one_rank_puts_the_other_gets(value):
    key_space = KeySpace("name", 2, process_mapping([0, 1]))
    assert only_reply(key_space, 0, f"cmd=put kvsname=name key=bc-0 value={value}") == "cmd=put_result rc=0 msg=success"
    assert only_reply(key_space, 1, "cmd=get kvsname=name key=bc-0") == f"cmd=get_result rc=0 msg=success value={value}"


def test_a_value_may_hold_spaces_and_equal_signs(key_space):
    key_space.answer(0, "cmd=put kvsname=fit-1-generation-0 key=k value=a=1 value=2  b ")
    reply = only_reply(key_space, 1, "cmd=get kvsname=fit-1-generation-0 key=k")
    assert reply == "cmd=get_result rc=0 msg=success value=a=1 value=2  b "


def test_a_key_that_nobody_put_is_not_found(key_space):
    reply = only_reply(key_space, 0, "cmd=get kvsname=fit-1-generation-0 key=PMI_hwloc_xmlfile")
    assert reply == "cmd=get_result rc=-1 msg=key_not_found value=unknown"


@pytest.mark.parametrize("name", ["kvsname=another-generation ", ""])
@pytest.mark.parametrize("command", ["put", "get"])
def test_the_key_space_of_another_generation_is_refused(key_space, command, name):
    assert "rc=-1" in only_reply(key_space, 0, f"cmd={command} {name}key=k value=v")


def test_values_and_keys_within_the_announced_limits_fit_and_longer_ones_do_not(key_space):
    def put(key, value):
        return only_reply(key_space, 0, f"cmd=put kvsname=fit-1-generation-0 key={key} value={value}")

    # The rank's C code counts the zero byte at the end.
    assert "rc=0" in put("k" * (KEY_LIMIT - 1), "v" * (VALUE_LIMIT - 1))
    assert "rc=-1" in put("k" * KEY_LIMIT, "v")
    assert "rc=-1" in put("k", "v" * VALUE_LIMIT)
    assert "rc=-1" in only_reply(key_space, 0, "cmd=put kvsname=fit-1-generation-0 value=v")


@pytest.mark.parametrize("name", ["", "two words", "line\n", "a=b", "n" * NAME_LIMIT])
def test_a_name_that_mpi_could_not_read_is_refused(name):
    with pytest.raises(ValueError, match="needs a name"):
        KeySpace(name, 1, process_mapping([0]))


# The barrier


def test_a_barrier_opens_for_all_once_the_last_rank_has_come(key_space):
    for _ in range(3):
        assert key_space.answer(1, "cmd=barrier_in") == []
        assert key_space.waiting_for == (0,)
        assert key_space.answer(0, "cmd=barrier_in") == [(0, "cmd=barrier_out"), (1, "cmd=barrier_out")]
        assert key_space.waiting_for == ()


def test_one_rank_passes_its_barrier_alone():
    key_space = KeySpace("name", 1, process_mapping([0]))
    assert key_space.answer(0, "cmd=barrier_in") == [(0, "cmd=barrier_out")]


def test_a_rank_that_comes_twice_to_one_barrier_is_a_protocol_error(key_space):
    key_space.answer(1, "cmd=barrier_in")
    with pytest.raises(ProtocolError, match="rank 1 came twice"):
        key_space.answer(1, "cmd=barrier_in")


# The hosts


def nodes_as_mpich_reads(value: str, size: int) -> list[int]:
    """MPICH's `MPL_rankmap_str_to_array`, for blocks alone: run after run of ranks, in order."""
    prefix = "(vector,"
    assert value.startswith(prefix)
    assert value.endswith(")")
    blocks = [tuple(map(int, block.split(","))) for block in value[len(prefix) + 1 : -2].split("),(")]
    nodes = [first + node for first, count, ranks in blocks for node in range(count) for _ in range(ranks)]
    assert len(nodes) == size, "MPICH would start again at the first block with node 0, or drop the rest"
    return nodes


@pytest.mark.parametrize(
    ("nodes", "value"),
    [
        ([0], "(vector,(0,1,1))"),
        ([0, 0, 0], "(vector,(0,1,3))"),
        ([0, 0, 1, 1], "(vector,(0,2,2))"),
        ([0, 1, 2], "(vector,(0,3,1))"),
        ([0, 1, 0], "(vector,(0,2,1),(0,1,1))"),
        ([0, 0, 1], "(vector,(0,1,2),(1,1,1))"),
        ([0, 1, 1, 2, 2, 0], "(vector,(0,1,1),(1,2,2),(0,1,1))"),
    ],
)
def test_the_mapping_says_which_ranks_share_a_host(nodes, value):
    assert process_mapping(nodes) == value


@given(nodes=st.lists(st.integers(0, 6), min_size=1, max_size=40))
def test_mpich_reads_back_the_hosts_of_any_layout(nodes):
    assert nodes_as_mpich_reads(process_mapping(nodes), len(nodes)) == nodes


def test_many_hosts_with_equally_many_ranks_are_one_block():
    assert process_mapping([rank // 8 for rank in range(8000)]) == "(vector,(0,1000,8))"


def test_a_layout_too_scattered_for_pmi_is_given_as_separate_hosts_with_a_warning(caplog):
    nodes = [rank * 7 % 211 for rank in range(400)]
    assert process_mapping(nodes) == "(vector,(0,400,1))"
    assert "Number the ranks host by host" in caplog.text


def test_ranks_numbered_host_by_host_fit_on_sixty_uneven_hosts():
    nodes = [node for node in range(60) for _ in range(1 + node % 3 * 100)]
    value = process_mapping(nodes)
    assert len(value) < VALUE_LIMIT
    assert nodes_as_mpich_reads(value, len(nodes)) == nodes


# The environment


def test_the_environment_makes_a_process_one_rank_and_hides_other_launchers():
    assert environment(rank=2, world_size=3, fd=17) == {
        "PMI_RANK": "2",
        "PMI_SIZE": "3",
        "PMI_FD": "17",
        "PMI_SPAWNED": "0",
        "MPIR_CVAR_PMI_VERSION": "1",
    }


def test_a_rank_that_puts_keys_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(pmi, "KEYS_PER_RANK", 3)  # one is the mapping itself
    keys = KeySpace("names", 1, "(vector,(0,1,1))")
    answers = [keys.answer(0, f"cmd=put kvsname=names key=k{number} value=v")[0][1] for number in (0, 0, 1, 2, 1)]
    assert [answer.partition("rc=")[2][:2] for answer in answers] == ["0 ", "0 ", "0 ", "-1", "0 "]
