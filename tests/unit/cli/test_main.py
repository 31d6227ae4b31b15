"""The command as a user meets it: help, exit codes, messages, what goes to which stream."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from manylora import __version__ as version
from manylora.cli import main as cli
from manylora.types import AdapterNotFound, ConfigError, DataError, SaveFailed

SRC = Path(cli.__file__).resolve().parents[2]
RUN = "base: seedling\nout: o\nadapters:\n  - {name: a, sft: {train: d.jsonl}}\n"


@pytest.fixture
def manylora(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MANYLORA_TRACEBACK", raising=False)

    def manylora(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return manylora


@pytest.fixture
def failing(monkeypatch):
    """Make `schema` fail with an error of our choice."""

    def failing(error: BaseException) -> None:
        def raise_it():
            raise error

        monkeypatch.setattr("manylora.config.run_json_schema", raise_it)

    return failing


def python(program: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["sample", "--help"]])
def test_help_loads_nothing_heavy(arguments):
    done = python(
        "import sys; from manylora.cli.main import main\n"
        f"code = main({arguments})\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'pydantic', 'yaml', 'rich'}\n"
        "print(code, sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    assert done.stderr.strip() == "0 []"
    assert "Usage: manylora" in done.stdout


def test_help_is_quick():
    """Well below 0.3 s on an idle machine; the limit leaves room for a busy one."""
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        assert python("from manylora.cli.main import main; main(['--help'])").returncode == 0
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 1.0


def test_every_command_has_a_line_and_an_example(manylora):
    code, out, _ = manylora("--help")
    assert code == 0
    for command in cli.COMMANDS:
        assert f"\n  {command} " in out
        code, text, _ = manylora(command, "--help")
        assert code == 0
        assert f"Example: manylora {command}" in " ".join(text.split())


def test_version(manylora):
    code, out, err = manylora("--version")
    assert (code, out, err) == (0, f"manylora {version}\n", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "No such command"),
        (["train"], "Missing argument"),
        (["train", "--nonsense"], "No such option"),
        (["sample", "--max-tokens", "0", "--prompt", "x"], "--max-tokens"),
    ],
)
def test_wrong_usage_is_exit_2_on_stderr(manylora, arguments, said):
    code, out, err = manylora(*arguments)
    assert (code, out) == (2, "") and said in err


def test_a_wrong_run_file_is_exit_2_with_its_line(manylora):
    Path("run.yaml").write_text(RUN + "tokn_budget: 3\n")
    code, out, err = manylora("train", "run.yaml")
    assert (code, out) == (2, "")
    assert err == (
        "error: run.yaml:5: tokn_budget: is not a setting here; did you mean token_budget?\n"
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("what is wrong"), 2),
        (DataError("what is wrong"), 1),
        (AdapterNotFound("what is wrong"), 1),
        (SaveFailed("what is wrong"), 1),
    ],
)
def test_our_errors_are_one_paragraph(manylora, failing, error, code):
    failing(error)
    assert manylora("schema") == (code, "", "error: what is wrong\n")


def test_a_note_becomes_a_hint(manylora, failing):
    error = DataError("what")
    error.add_note("do this")
    failing(error)
    assert manylora("schema") == (1, "", "error: what\nhint: do this\n")


def test_a_full_disk_is_named_plainly(manylora, failing):
    failing(OSError(28, "No space left on device", "/x"))
    assert manylora("schema") == (1, "", "error: No space left on device: /x\n")


def test_a_fault_of_ours_says_so_without_a_traceback(manylora, failing):
    failing(KeyError("x"))
    code, out, err = manylora("schema")
    assert (code, out) == (1, "")
    assert err.startswith("error: KeyError: 'x'\nhint: this is a fault in manylora")
    assert "Traceback" not in err


def test_a_traceback_is_there_for_the_asking(manylora, failing, monkeypatch):
    failing(DataError("what"))
    _, _, err = manylora("--traceback", "schema")
    assert "Traceback" in err and err.endswith("error: what\n")
    monkeypatch.setenv("MANYLORA_TRACEBACK", "1")
    assert "Traceback" in manylora("schema")[2]


def test_ctrl_c_is_exit_130(manylora, failing):
    failing(KeyboardInterrupt())
    code, out, err = manylora("schema")
    assert (code, out) == (130, "") and err.strip() == "stopped"


def test_a_reader_that_left_is_no_error_of_ours():
    """As in `manylora schema | head -1`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "manylora.cli.main", "schema"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(SRC)},
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    process.wait(timeout=60)


def test_schema_is_json(manylora):
    code, out, err = manylora("schema")
    assert (code, err) == (0, "")
    assert json.loads(out)["title"] == "manylora run file"
