"""What each command asks of its room, and what it prints of the answer."""

import json
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from manylora.cli import main as cli
from manylora.cli.adapter_folder import common_base, find_adapter
from manylora.cli.sample import distinct, printable
from manylora.runs.footprint import MemoryPlan
from manylora.runs.run_plan import AdapterPlan, RunPlan
from manylora.types import (
    CheckpointDamaged,
    CheckpointError,
    ConfigError,
    SampledSequence,
    SamplingParams,
)
from manylora.types.memory import bytes_text

RUN = "base: seedling\nout: o\nadapters:\n  - {name: a, sft: {train: d.jsonl}}\n"


@pytest.fixture
def manylora(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def manylora(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return manylora


def peft_folder(path: Path, base: str | None = "seedling") -> Path:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    return path


def state_folder(path: Path, base: str = "seedling") -> Path:
    path.mkdir(parents=True)
    (path / "manifest.json").write_text(json.dumps({"about": {"base_name": base}}))
    return path


# --- train and quickstart ---------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch):
    """Calls of `train_run_file`; it gives 7."""
    calls: list[Any] = []

    def train_run_file(run, *, overwrite, view):
        calls.append((run, overwrite, view))
        return 7

    monkeypatch.setitem(
        sys.modules, "manylora.runs.train", SimpleNamespace(train_run_file=train_run_file)
    )
    return calls


def test_train_hands_on_its_options_and_the_exit_code(manylora, trained):
    Path("run.yaml").write_text(RUN)
    assert manylora("train", "run.yaml")[0] == 7
    arguments = ("--set", "adapters.a.seed=3", "--set", "token_budget=9", "--overwrite", "--json")
    assert manylora("train", "run.yaml", *arguments)[0] == 7
    (run, overwrite, view), (changed, overwrite_2, view_2) = trained
    assert (overwrite, view, overwrite_2, view_2) == (False, "auto", True, "json")
    assert (run.adapters[0].seed, run.token_budget) == (0, 4096)
    assert (changed.adapters[0].seed, changed.token_budget) == (3, 9)


def test_a_dry_run_prints_the_plan_and_trains_nothing(manylora, trained, monkeypatch):
    adapter = AdapterPlan(
        name="a", rank=(2, 4), num_targets=3, num_params=1000, num_bytes=16000, num_examples=5,
        num_eval_examples=0, batch_size=2, steps=3, num_tokens=70, longest=99,
    )  # fmt: skip
    memory = MemoryPlan(
        process=5 << 20, base=3 << 20, adapters=1 << 20, plain=2 << 20, recomputed=1 << 20,
        activations=2 << 20, decode_cache=1 << 20, ranks=2, free=1 << 30,
    )  # fmt: skip
    plan = RunPlan(
        base="b", architecture="Llama", base_params=5000, context_length=64, out="o",
        adapters=(adapter,), memory=memory,
    )  # fmt: skip
    monkeypatch.setattr("manylora.runs.run_plan.plan_run", lambda run: plan)
    Path("run.yaml").write_text(RUN)
    code, out, err = manylora("train", "run.yaml", "--dry-run")
    assert code == 0 and trained == []
    assert "base b: Llama, 5,000 parameters, context 64" in out
    row = next(line.split() for line in out.splitlines() if line.startswith("a "))
    assert " ".join(row) == "a 2–4 3 1,000 15.6 KiB 5 0 2 3 70 99"
    assert "2.0 MiB (1.0 MiB with activation_checkpointing)" in out
    assert "at the peak in each of 2 processes  about 11.0 MiB" in out
    assert err.startswith("warning: adapter a: its longest example has 99 tokens")
    code, out, _ = manylora("train", "run.yaml", "--dry-run", "--json")
    assert json.loads(out)["adapters"][0]["steps"] == 3


def test_quickstart_hands_on_its_options(manylora, monkeypatch):
    calls: list[Any] = []
    module = SimpleNamespace(main=lambda **options: calls.append(options))
    monkeypatch.setitem(sys.modules, "manylora.quickstart.run", module)
    monkeypatch.setitem(sys.modules, "manylora.quickstart", SimpleNamespace(run=module))
    assert manylora("quickstart")[0] == 0
    assert manylora("quickstart", "--out", "x", "--steps", "2", "--overwrite")[0] == 0
    assert calls == [
        {"out": Path("runs/quickstart"), "steps": None, "overwrite": False},
        {"out": Path("x"), "steps": 2, "overwrite": True},
    ]


# --- finding adapters -------------------------------------------------------------------------


def test_every_form_of_an_adapter_folder_is_found(tmp_path):
    run = tmp_path / "run"
    final = peft_folder(run / "a" / "final")
    state_folder(run / "a" / "checkpoints" / "step-9")
    state_folder(run / "b" / "checkpoints" / "step-9", base="other")
    newest = state_folder(run / "b" / "checkpoints" / "step-10", base="other")
    (run / "b" / "checkpoints" / "step-11").mkdir()

    def found(*parts: str) -> tuple[Any, ...]:
        adapter = find_adapter(run.joinpath(*parts))
        return adapter.kind, adapter.folder, adapter.base, adapter.label

    assert found("a") == found("a", "final") == ("peft", final, "seedling", "a")
    assert found("b") == ("state", newest, "other", "b")
    assert found("b", "checkpoints") == ("state", newest, "other", "checkpoints")
    assert found("b", "checkpoints", "step-9")[3] == "b@9"


def test_what_is_no_adapter_is_told_what_would_be(tmp_path):
    peft_folder(tmp_path / "run" / "a" / "final")
    with pytest.raises(CheckpointError, match=r"is no adapter; .*perhaps one of those in it: a$"):
        find_adapter(tmp_path / "run")
    with pytest.raises(CheckpointError, match="there is no such folder"):
        find_adapter(tmp_path / "none")
    broken = peft_folder(tmp_path / "broken")
    (broken / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointDamaged, match=r"adapter_config\.json: cannot be read"):
        find_adapter(broken)


def test_adapters_agree_on_a_base_or_the_user_says_which(tmp_path):
    one = find_adapter(peft_folder(tmp_path / "one", "x"))
    two = find_adapter(state_folder(tmp_path / "two", "x"))
    other = find_adapter(peft_folder(tmp_path / "other", "y"))
    bare = find_adapter(peft_folder(tmp_path / "bare", None))
    assert common_base([one, two, bare], None) == "x"
    assert common_base([one, other], "z") == "z"
    with pytest.raises(ConfigError, match=r"different bases \(x, y\); give --base"):
        common_base([one, other], None)
    with pytest.raises(ConfigError, match="no base is named; give --base"):
        common_base([bare], None)


def test_labels_are_made_to_differ():
    assert distinct(["a", "b", "a", "a"]) == ["a", "b", "a (2)", "a (3)"]


@pytest.mark.parametrize(
    ("count", "text"),
    [(3, "3 B"), (1024, "1.0 KiB"), (3 * 2**19, "1.5 MiB"), (2**34, "16.0 GiB")],
)
def test_sizes(count, text):
    assert bytes_text(count) == text


def test_an_answer_cannot_steer_the_terminal():
    assert printable("é\n\t\x1b[2Jx\r\x00") == "é\n\t�[2Jx��"


# --- sample and export ------------------------------------------------------------------------


class Letters:
    """A tokenizer whose tokens are code points."""

    bos_token_id: int | None = None
    eos_token_id: int | None = None
    chat_template: str | None = None

    def __call__(self, text, **_):
        if isinstance(text, str):
            return {"input_ids": [ord(letter) for letter in text]}
        return {"input_ids": [[ord(letter) for letter in one] for one in text]}

    def decode(self, tokens, **_) -> str:
        return "".join(map(chr, tokens))


def done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


class Client:
    """Answers a prompt with where its weights came from."""

    def __init__(self, answer: str, log: list[Any]):
        self.answer, self.log = answer, log

    def sample(self, prompts, params):
        self.log.append(("sample", self.answer, prompts, params))
        letters = tuple(ord(letter) for letter in self.answer)
        answer = SampledSequence(letters, (-0.5,) * len(letters), "length")
        return done(SimpleNamespace(sequences=[answer]))

    def export(self, folder, *, merged=False):
        self.log.append(("export", self.answer, folder, merged))
        return done(folder)


@pytest.fixture
def client(monkeypatch):
    """What is asked of a `Trainer`."""
    log: list[Any] = []

    class Trainer(Client):
        tokenizer = Letters()

        def __init__(self, base, *, quantization=None):
            super().__init__("base", log)
            log.append(("open", base) if quantization is None else ("open", base, quantization))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            log.append(("close",))

        def create(self, name, *, init_from):
            return Client(f"peft {init_from.name}", log)

        def restore(self, name, folder):
            return Client(f"state {folder.name}", log), {}

    monkeypatch.setitem(sys.modules, "manylora.api", SimpleNamespace(Trainer=Trainer))
    return log


def test_the_bare_base_answers(manylora, client):
    code, out, _ = manylora("sample", "--base", "b", "--prompt", "hi")
    assert (code, out) == (0, "base\n")
    assert client == [
        ("open", "b"),
        ("sample", "base", [[104, 105]], SamplingParams(max_tokens=64)),
        ("close",),
    ]


def test_the_base_may_be_kept_in_few_bits(manylora, client):
    assert manylora("sample", "--base", "b", "--quantization", "nf4", "--prompt", "hi")[0] == 0
    assert client[0] == ("open", "b", "nf4")


def test_adapters_answer_side_by_side(manylora, client):
    peft_folder(Path("r/one/final"))
    state_folder(Path("r/second/checkpoints/step-3"))
    options = ("--max-tokens", "5", "--temperature", "0.5", "--seed", "2", "--prompt", "hi")
    adapters = ("--adapter", "r/one", "--adapter", "r/second")
    code, out, _ = manylora("sample", *adapters, *options)
    assert code == 0
    assert out == "one     peft final\nsecond  state step-3\n"
    assert client[0] == ("open", "seedling")
    expected = SamplingParams(max_tokens=5, temperature=0.5, seed=2)
    assert [entry[3] for entry in client if entry[0] == "sample"] == [expected, expected]
    code, out, _ = manylora("sample", *adapters, *options, "--json")
    assert [json.loads(line) for line in out.splitlines()] == [
        {
            "adapter": label,
            "answer": answer,
            "stop_reason": "length",
            "prompt_tokens": 2,
            "tokens": len(answer),
            "token_ids": [ord(letter) for letter in answer],
            "logprobs": [-0.5] * len(answer),
        }
        for label, answer in (("one", "peft final"), ("second", "state step-3"))
    ]


def test_a_prompt_may_come_from_standard_input(manylora, client, monkeypatch):
    stdin = SimpleNamespace(isatty=lambda: False, read=lambda: "hi\n")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert manylora("sample", "--base", "b")[0] == 0
    assert client[1][2] == [[104, 105]]
    stdin.isatty = lambda: True
    code, _, err = manylora("sample", "--base", "b")
    assert code == 2 and "give --prompt" in err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--prompt", "x"], 2, "no base is named"),
        (["--base", "b", "--prompt", "x", "--chat"], 2, "has no chat template"),
        (["--base", "b", "--prompt", ""], 1, "the prompt has no tokens"),
        (["--adapter", "none", "--prompt", "x"], 1, "none: there is no such folder"),
    ],
)
def test_what_cannot_be_sampled(manylora, client, arguments, code, said):
    got, out, err = manylora("sample", *arguments)
    assert (got, out) == (code, "") and said in err


def test_export_opens_the_adapter_s_own_base(manylora, client):
    state_folder(Path("r/a/checkpoints/step-3"), base="x")
    code, out, _ = manylora("export", "r/a", "new", "--merged")
    assert (code, out) == (0, "new\n")
    assert client[0] == ("open", "x")
    assert client[1] == ("export", "state step-3", Path("new"), True)


def test_export_does_not_overwrite(manylora, client):
    peft_folder(Path("a"))
    Path("there").mkdir()
    Path("there/x").write_text("")
    code, out, err = manylora("export", "a", "there")
    assert (code, out) == (2, "") and "is there already" in err
    assert client == []


# --- inspect ----------------------------------------------------------------------------------


@pytest.fixture
def described(monkeypatch):
    asked: list[Path] = []

    def describe(folder: Path):
        asked.append(folder)
        if not (folder / "adapter_config.json").is_file():
            raise CheckpointDamaged("nothing here")
        return {
            "kind": "peft-adapter",
            "parameters": 1234567,
            "targets": ["q", "v"],
            "step": None,
            "verified": True,
            "more": {"a": 1},
        }

    monkeypatch.setitem(sys.modules, "manylora.checkpoint", SimpleNamespace(describe=describe))
    return asked


def test_inspect_shows_what_is_there(manylora, described):
    peft_folder(Path("r/a/final"))
    code, out, _ = manylora("inspect", "r/a")
    assert code == 0
    assert out.splitlines() == [
        "kind: peft-adapter", "parameters: 1,234,567", "targets: q, v", "verified: yes", "more:",
        "  a: 1",
    ]  # fmt: skip
    assert described == [Path("r/a"), Path("r/a/final")]
    assert json.loads(manylora("inspect", "r/a/final", "--json")[1])["parameters"] == 1234567


def test_inspect_of_nothing(manylora, described):
    code, out, err = manylora("inspect", "none")
    assert (code, out) == (1, "") and "there is no such folder" in err
