"""A Ray cluster of two nodes on this machine, in processes of its own, and who lives in it.

Run as a script, it starts the cluster, prints its address, and ends with its standard input.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
START_SECONDS = 90.0


class TwoNodes:
    """Two raylets with one CPU each.

    Attributes:
        address: HOST:PORT of the head. environment: for programs that look for it as `auto`.
    """

    def __init__(self) -> None:
        # Paths of sockets below it may not be long.
        self._folder = tempfile.TemporaryDirectory(prefix="ray", dir="/tmp")
        self.environment = {
            **os.environ, "RAY_TMPDIR": self._folder.name, "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.parallel.ray_cluster"],
            cwd=REPO,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()
        assert self.address, "the cluster did not start"

    def actors(self) -> dict[int, int]:
        """The processes of all engines' actors on it, and each one's parent: its raylet."""
        found = {}
        for folder in Path("/proc").iterdir():
            try:
                words = (folder / "cmdline").read_bytes()
                if words.startswith(b"ray::RankActor"):
                    stat = (folder / "stat").read_text()
                    raylet = int(stat.rpartition(")")[2].split()[1])
                    # Another cluster's tests may run on this machine just now.
                    if self._folder.name in Path(f"/proc/{raylet}/cmdline").read_text():
                        found[int(folder.name)] = raylet
            except (OSError, ValueError):  # not a process, or not any more
                continue
        return found

    def close(self) -> None:
        """End it, and whatever it left."""
        self._process.communicate(timeout=60)
        self._folder.cleanup()


def wait_for(what: Callable[[], bool], seconds: float = 30.0) -> None:
    """Raises AssertionError: it does not become true."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def _main() -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=100 << 20, include_dashboard=False)
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    _main()
