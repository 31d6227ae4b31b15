"""A control process starts an engine's processes on the devices of a Ray cluster.

Ray's own client is in a process of its own (`ray_launcher`): it ends its process when the node that
it speaks to goes, sets signal handlers, writes to standard output and brings dozens of threads, and
a control process must outlive its engine. Since that process is the owner of all actors, its end,
however it comes about, is theirs, too: that is Ray's rule, not ours.
"""

import json
import subprocess
import sys
from typing import Any

from manylora.processes.commands import Assignment
from manylora.types import ConfigError, EngineLost

# For so long enough devices may be wanting before it counts as a mistake.
PLACE_SECONDS = 120.0


class RayClient:
    """This launcher's processes are actors of a Ray cluster; see `group.Launcher`."""

    def __init__(self, address: str, *, place_seconds: float = PLACE_SECONDS):
        """Begin to connect.

        Args:
            address: of the cluster: `auto` or HOST:PORT. This machine must be a node of it.
            place_seconds: how long to wait for enough devices.
        """
        self._words = [
            *(sys.executable, "-m", "manylora.processes.ray_launcher"),
            *(address, str(place_seconds)),
        ]
        self._begin()

    def peer(self) -> str:
        """Return the address of another machine of the cluster; this one's own if it is alone.
        Raises ConfigError: ray is not installed, or there is no such cluster."""
        word = self._heard()
        if "peer" not in word:
            self.wait()
            raise self._as_error(word)
        return word["peer"]

    def __call__(self, assignment: Assignment) -> "RayClient":
        """Start the processes. Call `peer` before. It may be called again once they have ended, and
        then raises ConfigError as `peer` does."""
        if self._process.poll() is not None and self._started:
            self.wait()
            self._begin()
            self.peer()
        self._started = True
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(assignment.line())
            self._process.stdin.flush()
        except BrokenPipeError:
            self._process.wait()  # `poll` says why
        return self

    def poll(self) -> int | None:
        """Return the exit status, if it has ended. Raises ConfigError, EngineLost: it said why."""
        status = self._process.poll()
        if status and self._problem is None:
            self._problem = self._as_error(self._heard())
            self.wait()
        if self._problem is not None:
            raise self._problem
        return status

    def wait(self, timeout: float | None = None) -> int:
        """See `subprocess.Popen`."""
        status = self._process.wait(timeout)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        return status

    def kill(self) -> None:
        """End it at once; Ray ends its actors."""
        self._process.kill()

    def _begin(self) -> None:
        self._problem: ConfigError | EngineLost | None = None
        self._started = False
        # A session of its own: Ctrl-C in a terminal reaches the control process alone.
        self._process = subprocess.Popen(
            self._words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )

    def _heard(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else {}

    def _as_error(self, word: dict[str, Any]) -> ConfigError | EngineLost:
        if "problem" not in word:
            return EngineLost("the launcher of the Ray actors ended; the log says why")
        return (ConfigError if word["config"] else EngineLost)(word["problem"])
