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


# A line that the benchmark prints, where a goal stands only beside a base that has one.
PRINTED = re.compile(
    r"^(?P<base>\S+) +(?P<tokens>\d+)  "
    r"overhead (?P<overhead>[\d.]+) \([^,)]*(, goal ≤ (?P<most>[\d.]+))?\), "
    r"floor (?P<floor>[\d.]+) "
    r"(.* speed-up (?P<speed>[\d.]+) \([^,)]*(, goal ≥ (?P<least>[\d.]+))?\) = "
    r"(?P<batching>[\d.]+) × (?P<smaller>[\d.]+))? +(?P<rate>\d+) tokens/s",
    re.MULTILINE,
)


def row(line: re.Match[str], base: str, goals: bool) -> str:
    """What the README's table says of one printed line."""
    found = line.groupdict()
    cells = [base, found["tokens"]]
    if goals:
        cells.append(", ".join(goal for goal in (found["most"], found["least"]) if goal))
    cells += [f"{float(found['overhead']):.2f}", found["floor"]]
    speed = (
        f"{float(found['speed']):.2f} ({found['batching']} × {found['smaller']})"
        if found["speed"]
        else ""
    )
    cells += [speed, f"{int(found['rate']):,}"]
    return "| " + " | ".join(cells) + " |"


@pytest.mark.parametrize(
    ("results", "names", "goals"),
    [
        ("2026-11-29_smollm2_cpu_2core.txt", {"smollm2-135m-instruct-fp32": "SmolLM2-135M"}, True),
        ("2026-11-29_cpu_2core.txt", {"toy": "toy", "seedling": "seedling"}, False),
    ],
)
def test_the_figures_are_those_on_record(results: str, names: dict[str, str], goals: bool):
    """The tables of numbers repeat the committed results of the benchmark."""
    printed = (README.parent / "benchmarks/results" / results).read_text(encoding="utf-8")
    lines = list(PRINTED.finditer(printed))
    assert [(line["base"], line["tokens"]) for line in lines] == [
        (name, tokens) for name in names for tokens in ("32", "128", "512")
    ]
    shown = README.read_text(encoding="utf-8").splitlines()
    for line in lines:
        assert row(line, names[line["base"]], goals) in shown
