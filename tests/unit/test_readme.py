"""What the README shows works as it stands."""

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


# A line that the benchmark prints: model, tokens, overhead, speed-up and its two parts.
PRINTED = re.compile(
    r"(\w+) +(\d+) +([\d.]+) \([^)]*≤ ([\d.]+)\) +[\d.]+ +([\d.]+) \([^)]*≥ ([\d.]+)\) +([\d.]+) +"
    r"([\d.]+) +fused"
)


def test_the_figures_are_those_on_record():
    """The table of numbers repeats the committed results of the benchmark."""
    results = README.parent / "benchmarks/results"
    machines = ("2026-11-20_cpu_2core.txt", "2026-11-21_cpu_2core_xeon.txt")
    printed = [PRINTED.findall((results / name).read_text(encoding="utf-8")) for name in machines]
    assert [len(lines) for lines in printed] == [6, 6]
    text = README.read_text(encoding="utf-8")
    for lines in zip(*printed, strict=True):
        model, tokens, _, overhead, _, speedup, *_ = lines[0]
        shown = f"| {model} | {tokens} | {float(overhead):.2f}, {speedup} |"
        for line in lines:
            assert line[:2] == (model, tokens)
            shown += f" {line[2]} | {line[4]} ({line[6]} × {line[7]}) |"
        assert shown in text
