"""Which process gets which rank and device, and which address leads where."""

import socket

import pytest

from manylora.processes.peer_addresses import address_toward, interface_of, listening_at
from manylora.processes.ray_actor import ActorPlace
from manylora.processes.ray_launcher import environment_of, ranks_of


def places(nodes: str) -> list[ActorPlace]:
    """One for each letter, the machine's name; devices are counted per machine from 4 on."""
    return [
        ActorPlace(node, f"10.0.0.{ord(node)}", node, (str(4 + nodes[:number].count(node)),))
        for number, node in enumerate(nodes)
    ]


@pytest.mark.parametrize(
    ("nodes", "tp", "by_rank"),
    [
        ("abab", 1, "aabb"),
        ("abab", 2, "aabb"),
        ("abaabb", 2, "aabbab"),  # only what no machine has room for is torn
        ("aaabbbbb", 4, "bbbbaaab"),
        ("abcd", 2, "abcd"),
    ],
)
def test_neighbours_share_a_machine(nodes: str, tp: int, by_rank: str) -> None:
    found = ranks_of(places(nodes), tp)
    assert sorted(found) == list(range(len(nodes)))
    assert "".join(nodes[number] for number in found) == by_rank


def test_each_rank_is_told_its_place() -> None:
    by_rank = places("abba")
    told = [environment_of(rank, by_rank, ("10.0.0.97", 29500), 2) for rank in range(4)]
    assert [one["RANK"] for one in told] == ["0", "1", "2", "3"]
    assert [one["LOCAL_RANK"] for one in told] == ["0", "0", "1", "1"]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in told] == ["4,5"] * 4
    assert {one["LOCAL_WORLD_SIZE"] for one in told} == {"2"}
    assert {(one["MASTER_ADDR"], one["MASTER_PORT"]) for one in told} == {("10.0.0.97", "29500")}
    assert {one["TORCHELASTIC_RESTART_COUNT"] for one in told} == {"2"}


def test_the_route_chooses_the_address() -> None:
    assert address_toward("127.0.0.1") == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.1") is None
    with pytest.raises(OSError):
        address_toward("no.such.host.invalid")


def test_only_the_chosen_address_is_listened_on() -> None:
    listener, address = listening_at("127.0.0.1")
    with listener:
        assert address == f"127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(OSError):
        listening_at("203.0.113.1")
    if socket.has_ipv6:
        listener, address = listening_at("::1")
        with listener:
            assert address.startswith("[::1]:")
