"""The second signal ends a run that does not get to its end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

REPO = Path(__file__).resolve().parents[4]
STUCK = """
import sys
from manylora.config import load_run_file
from manylora.runs.train import Dependencies, train_run_file
from tests.unit.runs.driving.fake_client import FakeClient, fake_newest_state
client = FakeClient(step_seconds=600)
outside = Dependencies(open_client=lambda _: client, newest_state=fake_newest_state)
sys.exit(train_run_file(load_run_file(sys.argv[1]), outside=outside, view="json"))
"""


@pytest.mark.slow
def test_a_second_signal_exits_at_once_but_not_the_echo_of_the_first(
    run_data: dict[str, Any], tmp_path: Path
):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**run_data, "out": str(run_data["out"])}))
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(file)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{REPO / 'src'}:{REPO}"},
    )
    try:
        assert process.stdout is not None
        started = (line for line in process.stdout if "eval_done" in line)
        next(started)  # a step may stand before the second adapter's evaluation
        time.sleep(0.5)  # until a step is with the worker
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
