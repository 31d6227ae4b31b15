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
