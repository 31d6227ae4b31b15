"""What the README shows works as it stands."""

import json
import re
from pathlib import Path

import pytest

from manylora.config import load_run_file

README = Path(__file__).parents[2] / "README.md"


def block(language: str) -> str:
    found = re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(found) == 1
    return found[0]


def test_the_python_example(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    exec(compile(block("python"), "README", "exec"), {})  # our own page
    loss, answer = capsys.readouterr().out.splitlines()
    assert float(loss.split()[0]) < 0.5
    assert "walrus" in answer
    assert (tmp_path / "runs/secret/adapter_model.safetensors").is_file()


def test_the_run_file(tmp_path: Path):
    (tmp_path / "run.yaml").write_text(block("yaml"), encoding="utf-8")
    run = load_run_file(tmp_path / "run.yaml")
    assert [adapter.name for adapter in run.adapters] == ["french", "support-tone"]


def test_the_figures_are_those_on_record():
    """The table of numbers repeats the committed results of the benchmark."""
    results = README.parent / "benchmarks/results/2026-11-20_cpu_2core.json"
    rows = json.loads(results.read_text(encoding="utf-8"))["rows"]
    text = README.read_text(encoding="utf-8")
    for row in rows:
        parts = f"{row['of_it_batching'][0]:.2f} × {row['of_it_overhead']:.2f}"
        shown = (
            f"| {row['model']} | {row['tokens_per_tenant']} | {row['overhead_step'][0]:.2f} "
            f"| {row['speedup'][0]:.2f} | {parts} |"
        )
        assert shown in text
