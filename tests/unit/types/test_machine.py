"""What the machine says of itself."""

from pathlib import Path

import pytest

from manylora.types import machine


@pytest.mark.parametrize(
    ("text", "count"), [("nr_free_pages 5\noom_kill 12\nswap_ra 1\n", 12), ("swap_ra 1\n", None)]
)
def test_the_kernels_count_of_processes_that_it_killed(
    text: str, count: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vmstat").write_text(text)
    monkeypatch.setattr(machine, "Path", lambda name: tmp_path / Path(name).name)
    assert machine.oom_kills() == count
    (tmp_path / "vmstat").unlink()
    assert machine.oom_kills() is None


def test_a_control_groups_limit_bounds_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    write("cgroup", "0::/outer/inner\n")
    write("meminfo", "MemTotal: 9 kB\nMemAvailable: 1000 kB\n")
    write("statm", "1 1 1")
    for group, most in (("outer", "300000"), ("outer/inner", "max")):
        write(f"fs/{group}/memory.max", most)
        write(f"fs/{group}/memory.current", "100000")
        write(f"fs/{group}/memory.stat", "anon 70000\ninactive_file 20000\nactive_file 10000\n")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "fs")
    monkeypatch.setattr(machine, "Path", lambda name: tmp_path / Path(name).name)
    assert machine.free_host_bytes() == 300_000 - 100_000 + 30_000
    write("fs/outer/memory.max", "max")
    assert machine.free_host_bytes() == 1000 * 1024
    write("cgroup", "5:cpu,memory:/job\n4:cpuset:/other\n")
    for name, count in (("limit", 50_000), ("usage", 60_000)):
        write(f"fs/memory/job/memory.{name}_in_bytes", str(count))
    write("fs/memory/job/memory.stat", "cache 1\n")
    assert machine.free_host_bytes() == 0  # what is over the limit is not less than nothing


def test_freed_memory_that_the_allocator_keeps_is_counted() -> None:
    assert 0 <= machine.freed_heap_bytes() < 1 << 50
