"""Users' code and prompts are checked against each other without a base."""

import json
import subprocess
import sys

import pytest

from manylora.config import load_run_file
from manylora.runs.rl.inputs import read_inputs
from manylora.types import ConfigError, DataError

RUN = """
base: nowhere
out: out
adapters:
  - name: digits
    lora: {rank: 4}
    optimizer: {lr: 1.0e-3}
    rl:
      prompts: p.jsonl
      eval: {prompts: e.jsonl}
      groups: 2
      GIVEN
"""


@pytest.fixture
def read(tmp_path):
    """Write a run file with its files beside it, and read what it names."""

    def make(given, rows, eval_rows=({"prompt": "z", "answer": 1},)):
        for name, some in (("p.jsonl", rows), ("e.jsonl", eval_rows)):
            (tmp_path / name).write_text("\n".join(map(json.dumps, some)))
        (tmp_path / "helpers.py").write_text("ONE = 1\n")
        (tmp_path / "code.py").write_text(
            "import helpers\n"
            "def f(completion, answer):\n    return helpers.ONE\n"
            "async def play(client, row):\n    return 1\n"
        )
        (tmp_path / "run.yaml").write_text(RUN.replace("GIVEN", given))
        return read_inputs(load_run_file(tmp_path / "run.yaml").adapters[0])

    return make


ROWS = ({"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2})


def test_rewards_and_hooks_are_found_beside_the_run_file(read):
    inputs = read("reward: [code.py:f, {use: length, args: {target: 3}}]", ROWS)
    assert inputs.rewards is not None and inputs.rewards.names == ("f", "length")
    assert (len(inputs.rows), len(inputs.eval_rows), inputs.hook) == (2, 1, None)
    inputs = read("rollout: code.py:play", ROWS)
    assert inputs.rewards is None and inputs.shown == "code.py:play"
    assert callable(inputs.hook)


@pytest.mark.parametrize(
    ("given", "rows", "error", "told"),
    [
        ("reward: cod.py:f", ROWS, ConfigError, "cod.py: there is no such file; did"),
        ("reward: code.py:g", ROWS, ConfigError, "code.py has no 'g'"),
        ("rollout: code.py:f", ROWS, ConfigError, "rl.rollout: code.py:f must be written as"),
        ("reward: code.py:play", ROWS, ConfigError, "plays a rollout; name it with rl.rollout"),
        ("reward: code.py:f", ({"prompt": "a"},) * 2, ConfigError, "parameter 'answer', and the"),
        ("reward: code.py:f", (*ROWS, {"prompt": "c"}), DataError, "p.jsonl:3: has no column"),
        ("reward: code.py:f", ROWS[:1], DataError, "has 1 prompts, and a step takes groups: 2"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(read, given, rows, error, told):
    with pytest.raises(error) as caught:
        read(given, rows)
    assert told in str(caught.value)


def test_held_out_prompts_need_the_columns_too(read):
    with pytest.raises(
        DataError, match=r"e.jsonl:1: has no column 'answer', which rl.reward of ad"
    ):
        read("reward: code.py:f", ROWS, ({"prompt": "z"},))


def test_what_users_import_comes_without_torch():
    program = (
        "import sys, manylora\n@manylora.group_reward\ndef f(): ...\n"
        "manylora.RolloutResult(reward=1)\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
