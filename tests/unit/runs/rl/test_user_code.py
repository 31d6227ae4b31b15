"""Users' files are loaded: found, executed once, with their neighbours, and hashed."""

import sys
from pathlib import Path

import pytest

from manylora.config import RunFile
from manylora.runs.resume import claim, data_hashes
from manylora.runs.rl.user_code import code_file, code_files, load_symbol
from manylora.runs.run_folder import RunPaths
from manylora.types import ConfigError

KEY = "adapters.digits.rl.reward.0"


def write(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def refusal(name: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_symbol(name, KEY)
    assert str(caught.value).startswith(f"{KEY}: ")
    return str(caught.value)


def test_a_file_is_executed_once_however_many_of_its_functions_are_named(tmp_path):
    file = write(tmp_path, "my-rewards.v2.py", "made = []\ndef f(): return made\ng = f\n")
    first, second = load_symbol(f"{file}:f", KEY)(), load_symbol(f"{file}:g", KEY)()
    assert first is second and first == []
    assert list(tmp_path.iterdir()) == [file], "nothing is written beside it"


def test_a_file_that_has_changed_is_executed_anew(tmp_path):
    file = write(tmp_path, "r.py", "import h\ndef f(): return h.X\n")
    write(tmp_path, "h.py", "X = 1\n")
    assert load_symbol(f"{file}:f", KEY)() == 1
    write(tmp_path, "h.py", "X = 2\n")
    assert load_symbol(f"{file}:f", KEY)() == 2


def test_two_folders_may_each_have_neighbours_of_the_same_name(tmp_path):
    before = list(sys.path)
    functions = []
    for name in ("a", "b"):
        folder = tmp_path / name
        write(folder, "helpers.py", f"X = {name!r}\n")
        write(folder, "late.py", "import helpers\nY = helpers.X * 2\n")
        write(folder / "pkg", "__init__.py", "from .sub import Z\n")
        write(folder / "pkg", "sub.py", "import helpers\nZ = helpers.X * 3\n")
        text = "import helpers as h\nimport pkg.sub\nimport json\ndef f():\n    import late\n"
        text += "    from pkg import sub\n    return h.X, late.Y, sub.Z, pkg.sub.Z, json.dumps(1)\n"
        functions.append(load_symbol(f"{write(folder, 'rewards.py', text)}:f", KEY))
    assert functions[0]() == ("a", "aa", "aaa", "aaa", "1")
    assert functions[1]() == ("b", "bb", "bbb", "bbb", "1")
    assert sys.path == before
    assert not {"helpers", "late", "pkg", "rewards"} & sys.modules.keys()


def test_an_installed_module_is_named_without_a_file():
    import json

    assert load_symbol("json:loads", KEY) is json.loads
    assert load_symbol("json.decoder:JSONDecoder.decode", KEY) is json.JSONDecoder.decode


def test_what_is_missing_is_named_with_what_is_there(tmp_path):
    file = write(tmp_path, "rewards.py", "def digits(completions): ...\ndef vowels(): ...\n")
    assert "there is no such file; did you mean rewards.py?" in refusal(f"{tmp_path}/reward.py:f")
    assert "rewards.py has no 'digit'; did you mean digits?" in refusal(f"{file}:digit")
    assert "rewards.py has no 'zz'; there are digits, vowels" in refusal(f"{file}:zz")
    assert "is a folder" in refusal(f"{write(tmp_path / 'x.py', 'a', '').parent}:f")
    assert "no module 'nothing_here' is installed" in refusal("nothing_here.rewards:f")
    assert "names no code; write module-file.py:symbol" in refusal("digits")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("import helpers\n1 / 0\n", "ZeroDivisionError: division by zero"),
        ("def f(:\n", "SyntaxError"),
        ("import sys\nsys.exit(3)\n", "SystemExit: 3"),
        ("import no_such_package\n", "No module named 'no_such_package'"),
    ],
)
def test_what_is_raised_while_it_is_loaded_is_shown_and_leaves_nothing(tmp_path, text, told):
    write(tmp_path, "helpers.py", "")
    file = write(tmp_path, "rewards.py", text)
    before = set(sys.modules)
    message = refusal(f"{file}:f")
    assert "cannot be loaded:" in message and told in message
    left = {name.rpartition(".")[2] for name in set(sys.modules) - before}
    assert not {"rewards", "helpers"} & left
    write(tmp_path, "rewards.py", "def f(): return 5\n")
    assert load_symbol(f"{file}:f", KEY)() == 5


def test_the_files_of_code_are_found_without_executing_them(tmp_path):
    file = write(
        tmp_path, "rewards.py", "import helpers, json\n1 / 0\ndef f():\n    import pkg.a\n"
    )
    helpers = write(tmp_path, "helpers.py", "from other import x\nfrom missing import y\n")
    other = write(tmp_path, "other.py", "import rewards\n")
    inits = write(tmp_path / "pkg", "__init__.py", "")
    a = write(tmp_path / "pkg", "a.py", "from . import b\nfrom .b import z\n")
    b = write(tmp_path / "pkg", "b.py", "")
    write(tmp_path, "unused.py", "")
    assert set(code_files(f"{file}:f")) == {file, helpers, other, inits, a, b}
    found = code_file("json.decoder:x")
    assert found is not None and found.name == "decoder.py"
    assert [code_file(name) for name in ("exact", "math:sqrt", "nothing.here:x")] == [None] * 3


def a_run(folder: Path, rewards: Path) -> RunFile:
    adapter = {
        "name": "digits",
        "lora": {"rank": 4},
        "optimizer": {"lr": 1e-3},
        "rl": {"prompts": f"{folder}/p.jsonl", "reward": [f"{rewards}:f", "exact"]},
    }
    return RunFile.model_validate({"base": "b", "out": folder / "out", "adapters": [adapter]})


@pytest.mark.parametrize("changed", ["rewards.py", "helpers.py"])
def test_code_that_has_changed_is_refused_on_resume_as_data_are(tmp_path, changed):
    rewards = write(tmp_path, "rewards.py", "import helpers\ndef f(completions): ...\n")
    write(tmp_path, "helpers.py", "X = 1\n")
    write(tmp_path, "p.jsonl", '{"prompt": "a"}\n')
    run = a_run(tmp_path, rewards)
    noted = data_hashes(run)["digits"]
    assert set(noted) == {f"{tmp_path}/{name}" for name in ("rewards.py", "helpers.py", "p.jsonl")}
    paths = RunPaths(tmp_path / "out")
    claim(run, paths)
    write(tmp_path, changed, "Y = 2\n")
    claim(run, paths)  # nothing was trained with it
    paths.adapter("digits").checkpoints.mkdir(parents=True)
    claim(run, paths)
    write(tmp_path, changed, "Y = 3\n")
    with pytest.raises(ConfigError, match=f"code of adapter digits: .*{changed} has changed since"):
        claim(run, paths)


def test_what_another_reward_has_paid_is_not_taken_for_this_ones(tmp_path):
    """Before its first training state an adapter may begin anew with other code or data."""
    rewards = write(tmp_path, "rewards.py", "def f(completions): ...\n")
    write(tmp_path, "p.jsonl", '{"prompt": "a"}\n')
    run, paths = a_run(tmp_path, rewards), RunPaths(tmp_path / "out")
    claim(run, paths)
    rollouts = paths.adapter("digits").rollouts
    write(rollouts, "pending.jsonl", "")
    claim(run, paths)
    assert rollouts.is_dir()
    write(tmp_path, "rewards.py", "def f(completion): ...\n")
    claim(run, paths)
    assert not rollouts.exists()
