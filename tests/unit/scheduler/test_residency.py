"""The least recently used make room, and what is in use stays."""

from manylora.scheduler import Residency


def test_by_count() -> None:
    held = Residency(max_count=2)
    for name in ("a", "b"):
        held.use(name, 10)
    held.use("a")
    assert held.excess(incoming=1) == ["b"]
    assert held.excess(keep={"b"}, incoming=1) == ["a"]
    assert held.excess(keep={"a", "b"}, incoming=1) == []
    held.drop("b")
    assert held.excess(incoming=1) == []
    assert "b" not in held and len(held) == 1


def test_by_bytes_and_one_thing_of_any_size() -> None:
    held = Residency(max_bytes=100)
    held.use("a", 60)
    held.use("b", 30)
    assert held.excess(incoming=10) == []
    assert held.excess(incoming=50) == ["a"]
    assert held.excess(incoming=80) == ["a", "b"]
    held.use("a", 500)
    held.drop("b")
    assert held.num_bytes == 500 and held.excess() == []
    assert held.excess(incoming=1) == ["a"]


def test_without_limits_nothing_goes() -> None:
    held = Residency()
    for number in range(1000):
        held.use(str(number), 1 << 30)
    assert held.excess(incoming=1 << 40) == []
