"""The commands that speak to a server, as a user types them."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import PeftModel
from safetensors.numpy import load, load_file
from transformers import AutoModelForCausalLM

from manylora.models.base import resolve_base
from tests.wire.plain import Plain, lines
from tests.wire.server import Server, create_key
from tests.wire.weights import WEIGHTS_FILE, download

RUN_FILE = """
base: seedling
out: runs/never-written
adapters:
  - name: good
    lora: {rank: 4}
    optimizer: {lr: 2e-3}
    sft: {train: data/good.jsonl, eval: data/held-out.jsonl, batch_size: 4, max_steps: 12}
  - name: bad
    sft: {train: data/bad.jsonl, max_steps: 2}
"""

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run file and its data."""
    (tmp_path / "work" / "data").mkdir(parents=True)
    (tmp_path / "work" / "run.yaml").write_text(RUN_FILE)
    data = {"good": lines(), "held-out": lines(count=6), "bad": lines(count=3) + "nonsense\n"}
    for name, text in data.items():
        (tmp_path / "work" / "data" / f"{name}.jsonl").write_text(text)
    return tmp_path / "work"


def command(folder: Path, url: str, key: str, *words: str) -> subprocess.CompletedProcess[str]:
    """`manylora …`, which never says the key."""
    done = subprocess.run(
        [sys.executable, "-m", "manylora.cli.main", *words],
        cwd=folder, capture_output=True, text=True, check=False, timeout=200,
        env={
            **os.environ, "TINKER_BASE_URL": url, "TINKER_API_KEY": key,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        },
    )  # fmt: skip
    assert not key or key not in done.stdout + done.stderr
    return done


def events(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_submit_show_export_and_delete(serve, folder: Path, tmp_path: Path) -> None:
    key = create_key(tmp_path / "data", "ann")
    server: Server = serve()

    def cli(*words: str) -> subprocess.CompletedProcess[str]:
        return command(folder, server.url, key, *words)

    both = cli("submit", "run.yaml", "--json")
    assert both.returncode == 1, both.stderr
    told = events(both)
    assert [e["step"] for e in told if e["event"] == "step_done"] == list(range(1, 13))
    ended = {e["adapter"]: e for e in told if e["event"] == "adapter_ended"}
    assert ended["good"]["status"] == "completed"
    assert ended["bad"]["error"].startswith("DataError: data/bad.jsonl:4: is not JSON")
    assert told[0]["event"] == "run_started" and told[-1]["event"] == "run_ended"
    good = told[-1]["summary"]["adapters"]["good"]
    assert good["eval_after"]["loss"] < good["eval_before"]["loss"]
    alone = cli("submit", "run.yaml", "--adapter", "good", "--set", "adapters.good.sft.max_steps=2")
    assert alone.returncode == 0, alone.stderr
    assert "good  completed  step 2/2" in alone.stdout and "tinker://" in alone.stdout

    listed = json.loads(cli("runs", "list", "--json").stdout)
    assert sorted(run["name"] for run in listed) == ["bad", "good", "good"]
    assert "failed" in cli("runs", "list").stdout
    assert "status: completed" in cli("runs", "show", good["id"]).stdout
    assert json.loads(cli("runs", "delete", good["id"], "--json").stdout)["status"] == "completed"
    assert cli("adapters", "list").stdout == ""
    assert "lora_rank: 4" in cli("checkpoints", "show", good["path"]).stdout

    exported_as_peft_loads_it(cli, good, tmp_path / "data", tmp_path / "running")
    external = tensors_of(server, good["external_path"], key)
    assert cli("checkpoints", "delete", good["external_path"]).returncode == 0
    assert good["external_path"] not in cli("checkpoints", "list").stdout
    assert server.stop() == 0
    exported_as_peft_loads_it(cli, good, tmp_path / "data", tmp_path / "stopped")
    for place in ("running", "stopped"):
        own = safetensors_of(tmp_path / place)
        assert own.keys() == external.keys()
        assert all(np.array_equal(own[name], external[name]) for name in own)
    gone = cli("runs", "list")
    assert gone.returncode == 1 and "does not answer" in gone.stderr


def tensors_of(server: Server, path: str, key: str) -> dict[str, Any]:
    return load(download(server, path, key)[WEIGHTS_FILE])


def safetensors_of(folder: Path) -> dict[str, Any]:
    return load_file(folder / "adapter_model.safetensors")


def exported_as_peft_loads_it(cli: Cli, run: dict[str, Any], data_dir: Path, out: Path) -> None:
    """Export a training checkpoint, and have stock PEFT put it on the base."""
    done = cli("export", run["path"], str(out), "--data-dir", str(data_dir))
    assert done.returncode == 0, done.stderr
    base = AutoModelForCausalLM.from_pretrained(resolve_base("seedling"))
    model = PeftModel.from_pretrained(base, out)
    loaded = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert len(loaded) == len(safetensors_of(out))


def test_follows_a_run_through_a_restart(serve, folder: Path) -> None:
    server: Server = serve()
    steps = "adapters.good.sft.max_steps=150"
    outcome: list[subprocess.CompletedProcess[str]] = []
    words = ("submit", "run.yaml", "--adapter", "good", "--set", steps, "--json")
    thread = threading.Thread(
        target=lambda: outcome.append(command(folder, server.url, "tml-x", *words))
    )
    thread.start()
    plain, end = Plain(server), time.monotonic() + 100
    while not (runs := plain.ok("GET", "runs")["runs"]) or runs[0]["step"] < 20:
        assert time.monotonic() < end
        time.sleep(0.1)
    server.restart()
    thread.join()
    (done,) = outcome
    assert done.returncode == 0, done.stderr
    told = events(done)
    assert [e["step"] for e in told if e["event"] == "step_done"] == list(range(1, 151))


def test_cancelled_refused_and_unauthorised(serve, folder: Path, tmp_path: Path) -> None:
    key = create_key(tmp_path / "data", "ann")
    server: Server = serve()
    other = command(folder, server.url, key, "submit", "run.yaml", "--set", "base=another/base")
    assert other.returncode == 1 and "this server's is seedling" in other.stdout
    unknown = command(folder, server.url, "tml-unknown-key-of-nobody", "runs", "list")
    assert unknown.returncode == 1 and "key is unknown" in unknown.stderr
    none = command(folder, server.url, "", "runs", "list")
    assert none.returncode == 2 and "TINKER_API_KEY" in none.stderr
    (folder / "key").write_text(f"{key}\n")
    by_file = command(folder, server.url, "", "runs", "list", "--json", "--key-file", "key")
    assert by_file.returncode == 0 and by_file.stdout.strip() == "[]"
    missing = command(folder, server.url, key, "submit", "run.yaml", "--adapter", "none")
    assert missing.returncode == 2 and "good, bad" in missing.stderr
    outcome: list[subprocess.CompletedProcess[str]] = []
    steps = "adapters.good.sft.max_steps=100000"
    words = ("submit", "run.yaml", "--adapter", "good", "--set", steps)
    thread = threading.Thread(
        target=lambda: outcome.append(command(folder, server.url, key, *words))
    )
    thread.start()
    plain, end = Plain(server, key), time.monotonic() + 100
    while not (runs := plain.ok("GET", "runs")["runs"]) or runs[0]["step"] < 3:
        assert time.monotonic() < end
        time.sleep(0.1)
    assert command(folder, server.url, key, "runs", "delete", runs[0]["id"]).returncode == 0
    thread.join()
    assert outcome[0].returncode == 130 and "good  cancelled" in outcome[0].stdout


def test_a_path_that_is_no_checkpoint(folder: Path) -> None:
    for words, complaint in (
        (("export", "tinker://x/weights/y", "out"), "needs --data-dir"),
        (("export", "tinker://x/weights/y", "out", "--data-dir", "."), "no data folder"),
        (("checkpoints", "show", "x/weights/y"), "is no checkpoint"),
    ):
        done = command(folder, "http://127.0.0.1:9", "tml-x", *words)
        assert done.returncode in (1, 2) and complaint in done.stderr
