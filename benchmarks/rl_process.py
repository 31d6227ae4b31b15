"""A process of `benchmarks.rl` opens a base, and trains run files on it as it is told.

    python -m benchmarks.rl_process RUN.yaml

opens the base as RUN.yaml says. A line on stdin is a JSON list of run files, which are trained one
after another on the open base; the answer is a line with their exit codes.
"""

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from manylora.config import load_run_file
from manylora.runs.train import Dependencies, open_trainer, train_run_file


def train(files: list[str], client: Any) -> list[int]:
    """Train run files on a client that is open and stays open; return their exit codes."""
    outside = Dependencies(open_client=lambda run: nullcontext(client))
    return [
        train_run_file(load_run_file(Path(file)), view="plain", outside=outside) for file in files
    ]


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    # What runs print is nobody's.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with open_trainer(load_run_file(Path(sys.argv[1]))) as client:
        answers.write("[]\n")
        for line in sys.stdin:
            answers.write(json.dumps(train(json.loads(line), client)) + "\n")


if __name__ == "__main__":
    main()
