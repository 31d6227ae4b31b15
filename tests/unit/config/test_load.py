"""Run files: what they mean, and what is said of those that are wrong."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.config import RunFile, SftSettings, load_run_file, resolved_yaml, run_json_schema
from manylora.types import AdamParams, AdapterSpec, ConfigError

SMALL = """\
base: seedling
out: runs/first
adapters:
  - name: reverse
    sft:
      train: data/reverse.jsonl
"""

FULL = """\
base: seedling
out: runs/quickstart
token_budget: 2048
activation_checkpointing: true
dtype: bf16
device: cuda:1
threads: 2
report: false
tensorboard: false
wandb: {project: p, entity: e}
trackio: {project: q}
adapters:
  - name: reverse
    lora:
      rank: 8
      alpha: 16
      targets: [q_proj, v_proj]
      dropout: 0.1
      dtype: bf16
      init_from: old/final
      rank_pattern: {q_proj: 4}
      alpha_pattern: {q_proj: 2.5}
      use_rslora: true
      init: gaussian
    optimizer: {lr: 2.0e-3, schedule: cosine, warmup_steps: 10, betas: [0.8, 0.99], eps: 1e-6,
                weight_decay: 0.1, clip_norm: 0}
    sft: {train: data/a.jsonl, eval: org/name:test, batch_size: 4, max_steps: 7, shuffle: no}
    save_every: 50
    seed: 7
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "run.yaml") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return name

    return write


def message(call, *arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    return str(caught.value)


def test_ten_lines_are_enough(write):
    run = load_run_file(write(SMALL))
    (adapter,) = run.adapters
    assert (run.token_budget, run.dtype, run.out) == (4096, "auto", Path("runs/first"))
    assert (
        SftSettings.of(adapter).epochs,
        SftSettings.of(adapter).max_steps,
        SftSettings.of(adapter).batch_size,
    ) == (1, None, 16)
    assert adapter.spec() == AdapterSpec()
    assert adapter.optimizer.adam_params(0.5) == AdamParams(lr=0.5, clip_norm=1.0)


def test_every_setting_reaches_its_place(write):
    (adapter,) = load_run_file(write(FULL)).adapters
    assert adapter.spec() == AdapterSpec(
        rank=8,
        alpha=16.0,
        targets=("q_proj", "v_proj"),
        dropout=0.1,
        dtype="bf16",
        rank_pattern={"q_proj": 4},
        alpha_pattern={"q_proj": 2.5},
        use_rslora=True,
        init="gaussian",
        seed=7,
    )
    assert adapter.optimizer.adam_params(1.0) == AdamParams(
        lr=1.0, beta1=0.8, beta2=0.99, eps=1e-6, weight_decay=0.1, clip_norm=0.0
    )
    assert SftSettings.of(adapter).epochs is None and SftSettings.of(adapter).shuffle is False


def test_what_is_read_lies_beside_the_run_file_and_what_is_written_does_not(write, tmp_path):
    run = load_run_file(write(FULL.replace("base: seedling", "base: ../b"), "deep/run.yaml"))
    (adapter,) = run.adapters
    assert SftSettings.of(adapter).train == str(tmp_path / "deep/data/a.jsonl")
    assert adapter.lora.init_from == tmp_path / "deep/old/final"
    assert run.base == str(tmp_path / "b")
    assert run.out == Path("runs/quickstart")
    assert SftSettings.of(adapter).eval == "org/name:test"


@pytest.mark.parametrize("text", [SMALL, FULL])
def test_the_resolved_file_reads_back_the_same_from_anywhere(write, text):
    run = load_run_file(write(text))
    resolved = resolved_yaml(run)
    assert load_run_file(write(resolved, "elsewhere/run.yaml")) == run
    # A reader of YAML 1.1 sees the same, names such as `no` included.
    assert RunFile.model_validate(yaml.safe_load(resolved)) == run


@pytest.mark.parametrize("name", ["no", "on", "1e3", "007", "0x1f", "null", "true", "1_0"])
def test_resolved_names_stay_text(write, name):
    run = load_run_file(write(SMALL.replace("reverse\n", f"{name!r}\n", 1)))
    assert run.adapters[0].name == name
    assert load_run_file(write(resolved_yaml(run))) == run
    assert yaml.safe_load(resolved_yaml(run))["adapters"][0]["name"] == name


@pytest.mark.parametrize(
    ("written", "meant"),
    [("1e-3", 1e-3), ("1E-3", 1e-3), ("2.0e-3", 2e-3), (".5", 0.5), ("1", 1.0), ("+3.e+0", 3.0)],
)
def test_numbers_mean_what_people_expect(write, written, meant):
    text = SMALL + f"    optimizer: {{lr: {written}}}\n"
    assert load_run_file(write(text)).adapters[0].optimizer.lr == meant


def test_leading_zeros_do_not_mean_octal(write):
    assert load_run_file(write(SMALL + "    seed: 010\n")).adapters[0].seed == 10


def test_words_of_yaml_11_are_names_or_truth_values_where_they_are_asked_for(write):
    run = load_run_file(write(SMALL.replace("reverse\n", "no\n", 1) + "report: off\n"))
    assert run.adapters[0].name == "no"
    assert run.report is False


def test_adapters_share_settings_by_anchors_and_merge_keys(write):
    text = """\
base: seedling
out: o
adapters:
  - &first
    name: a
    sft: &sft {train: a.jsonl, batch_size: 2}
    lora: {rank: 3}
  - <<: *first
    name: b
  - <<: *first
    name: c
    sft: {<<: *sft, batch_size: 9}
  - {<<: *first, name: d, sft: *sft}
"""
    adapters = load_run_file(write(text)).adapters
    assert [a.name for a in adapters] == ["a", "b", "c", "d"]
    assert [a.lora.rank for a in adapters] == [3, 3, 3, 3]
    assert [SftSettings.of(a).batch_size for a in adapters] == [2, 2, 9, 2]


def test_a_mapping_with_merged_keys_can_itself_be_shared(write):
    text = """\
base: seedling
out: o
adapters:
  - name: a
    sft: {train: a.jsonl}
    lora: &plain {rank: 3, alpha: 5}
  - name: b
    sft: {train: a.jsonl}
    lora: &changed {<<: *plain, rank: 4}
  - {name: c, sft: {train: a.jsonl}, lora: *changed}
"""
    loras = [adapter.lora for adapter in load_run_file(write(text)).adapters]
    assert [(lora.rank, lora.alpha) for lora in loras] == [(3, 5), (4, 5), (4, 5)]


def adapter_with(line: str) -> str:
    """A run file whose seventh line is `line`."""
    return SMALL + f"    {line}\n"


WRONG = [
    # (text, what the message begins with, what else it says)
    (adapter_with("seeed: 1"), "run.yaml:7: adapters.reverse.seeed: ", "did you mean seed?"),
    (adapter_with("lr: 1"), "run.yaml:7: adapters.reverse.lr: ", "did you mean optimizer.lr?"),
    (adapter_with("lora: {rank: 0}"), "run.yaml:7: adapters.reverse.lora.rank: is 0", "≥ 1"),
    (adapter_with("lora: {rank: 8.5}"), "run.yaml:7: adapters.reverse.lora.rank: ", "whole number"),
    (adapter_with("lora: {rank: '8'}"), "run.yaml:7: adapters.reverse.lora.rank: is '8'", "whole"),
    (
        adapter_with("lora: {rank: true}"),
        "run.yaml:7: adapters.reverse.lora.rank: is true",
        "whole",
    ),
    (adapter_with("lora: {dropout: 1}"), "run.yaml:7: adapters.reverse.lora.dropout: is 1", "< 1"),
    (adapter_with("lora: {alpha: .inf}"), "run.yaml:7: adapters.reverse.lora.alpha: ", "finite"),
    (adapter_with("lora: {alpha: .nan}"), "run.yaml:7: adapters.reverse.lora.alpha: ", "is nan"),
    (adapter_with("lora: 8"), "run.yaml:7: adapters.reverse.lora: is 8", "mapping"),
    (
        adapter_with("lora: {dtype: fp8}"),
        "run.yaml:7: adapters.reverse.lora.dtype: is 'fp8'",
        "bf16",
    ),
    (
        adapter_with("lora: {targets: [1]}"),
        "run.yaml:7: adapters.reverse.lora.targets: ",
        "list of",
    ),
    (
        adapter_with("lora: {targets: '('}"),
        "run.yaml:7: adapters.reverse.lora.targets: ",
        "regular",
    ),
    (adapter_with("lora: {rank_pattern: {'{x(': 2}}"), "run.yaml:7: ", "'{x(' is not a regular"),
    (adapter_with("lora: {rank_pattern: {q: 0}}"), "run.yaml:7: ", "rank_pattern.q: is 0"),
    (adapter_with("lora: {init_from: 3}"), "run.yaml:7: ", "write an adapter folder"),
    (adapter_with("optimizer: {lr: fast}"), "run.yaml:7: ", "is 'fast'; it must be a number"),
    (adapter_with("optimizer: {lr: -1}"), "run.yaml:7: ", "is -1; it must be > 0"),
    (adapter_with("optimizer: {schedule: step}"), "run.yaml:7: ", "constant, linear or cosine"),
    (adapter_with("optimizer: {betas: [0.9]}"), "run.yaml:7: ", "must list two numbers"),
    (adapter_with("optimizer: {betas: [0.9, 1]}"), "run.yaml:7: ", "betas.1: is 1"),
    (adapter_with("save_every: -1"), "run.yaml:7: adapters.reverse.save_every: is -1", "≥ 0"),
    (adapter_with("seed: -1"), "run.yaml:7: adapters.reverse.seed: is -1", "≥ 0"),
    (adapter_with("name: twice"), "run.yaml:7: adapters.0.name is written twice", "line 4"),
    (adapter_with("7: x"), "run.yaml:7: key '7' is not text", "quotes"),
    (adapter_with("[a]: x"), "run.yaml:7: ", "cannot be a key"),
    (adapter_with("lora: {rank: 1"), "run.yaml:", "not valid YAML"),
    (adapter_with("\tlora: 1"), "run.yaml:7: ", "not tabs"),
    (adapter_with("lora: *nowhere"), "run.yaml:7: ", "nowhere"),
    (adapter_with("lora: !!python/name:os.system x"), "run.yaml:7: ", "not valid YAML"),
    (SMALL + "      epochs: 1\n      max_steps: 2\n", "run.yaml:8: ", "epochs is given too"),
    (SMALL + "      epochs: 0\n", "run.yaml:7: adapters.reverse.sft.epochs: is 0", "≥ 1"),
    (SMALL + "      eval: data.txt\n", "run.yaml:7: adapters.reverse.sft.eval: ", ".parquet"),
    (SMALL + "      shuffle: maybe\n", "run.yaml:7: ", "is 'maybe'; it must be true or false"),
    (SMALL.replace("reverse\n", "..\n", 1), "run.yaml:4: adapters.0.name: is '..'", "letters"),
    (SMALL.replace("reverse\n", "a/b\n", 1), "run.yaml:4: adapters.0.name: is 'a/b'", "letters"),
    (SMALL.replace("reverse\n", "-rf\n", 1), "run.yaml:4: adapters.0.name: is '-rf'", "neither"),
    (SMALL.replace("reverse\n", "12\n", 1), "run.yaml:4: adapters.0.name: is 12", "quotes"),
    (SMALL.replace("reverse\n", "true\n", 1), "run.yaml:4: adapters.0.name: is true", "quotes"),
    (
        SMALL + "  - {name: Reverse, sft: {train: b.jsonl}}\n",
        "run.yaml:7: adapters.Reverse.name: 'Reverse' is taken",
        "names must differ",
    ),
    (SMALL + "tokn_budget: 3\n", "run.yaml:7: tokn_budget: ", "did you mean token_budget?"),
    (SMALL + "device: gpu\n", "run.yaml:7: device: is 'gpu'", "cuda:N"),
    (SMALL + "dtype: fp16\n", "run.yaml:7: dtype: is 'fp16'", "bf16 or auto"),
    (SMALL + "threads: 0\n", "run.yaml:7: threads: is 0", "≥ 1"),
    (SMALL + "wandb: {entity: x}\n", "run.yaml:7: wandb.project: is missing", "Project"),
    (SMALL.replace("out: runs/first\n", ""), "run.yaml:1: out: is missing", "Folder"),
    ("base: b\nout: o\nadapters: []\n", "run.yaml:3: adapters: is empty", "one adapter"),
    ("base: b\nout: o\nadapters: {a: 1}\n", "run.yaml:3: adapters: ", "must be a list"),
    ("", "run.yaml: is empty", "base, out, and adapters"),
    ("- 1\n", "run.yaml: does not hold", "base, out, and adapters"),
    ("a: 1\n---\nb: 2\n", "run.yaml:2: ", "single document"),
    ("a: &x [*x]\n", "run.yaml:1: nested too deeply", ""),
    ("a: " + "[" * 5000, "run.yaml: nested too deeply", ""),
    ("a: !!bool maybe\n", "run.yaml:1: cannot read 'maybe'", "bool"),
    (SMALL + "threads: " + "9" * 5000 + "\n", "run.yaml:7: cannot read '999", "int"),
    ("a: 1\nb: \x07\n", "run.yaml:2: ", "U+0007"),
]


@pytest.mark.parametrize(("text", "start", "rest"), WRONG)
def test_an_error_names_file_line_key_and_remedy(write, text, start, rest):
    said = message(load_run_file, write(text))
    assert said.startswith(start), said
    assert rest in said, said
    assert "pydantic" not in said and "\n" not in said


def test_all_problems_are_listed_in_the_order_of_their_lines(write):
    text = SMALL + "    seed: x\n    lora: {rank: 0, alpha: -1}\ntokn: 3\n"
    lines = message(load_run_file, write(text)).splitlines()
    assert lines[0] == "run.yaml has 4 problems:"
    assert [line.split(": ")[0].strip() for line in lines[1:]] == [
        "run.yaml:7", "run.yaml:8", "run.yaml:8", "run.yaml:9",
    ]  # fmt: skip


def test_several_repeated_keys_are_listed_together(write):
    said = message(load_run_file, write("base: a\nbase: b\nout: c\nout: d\n"))
    assert "has 2 problems" in said and "run.yaml:2: base" in said and "run.yaml:4: out" in said


def test_a_missing_file_a_folder_and_bytes(write, tmp_path):
    write(SMALL)
    assert message(load_run_file, "none.yaml") == "none.yaml: there is no such file"
    assert "is a folder" in message(load_run_file, str(tmp_path))
    Path("latin.yaml").write_bytes(b"base: \xe9\n")
    assert "not UTF-8" in message(load_run_file, "latin.yaml")


# --- --set ------------------------------------------------------------------------------------

TWO = SMALL + "  - name: v1.2\n    sft: {train: b.jsonl}\n    optimizer: {lr: 1e-4}\n"


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("token_budget=128", lambda run: run.token_budget, 128),
        ("adapters.0.optimizer.lr=1e-3", lambda run: run.adapters[0].optimizer.lr, 1e-3),
        ("adapters.reverse.optimizer.lr=1e-3", lambda run: run.adapters[0].optimizer.lr, 1e-3),
        ("adapters.v1.2.optimizer.lr=1e-3", lambda run: run.adapters[1].optimizer.lr, 1e-3),
        ("adapters.1.lora.targets=[q_proj]", lambda run: run.adapters[1].lora.targets, ["q_proj"]),
        ("adapters.1.lora.rank_pattern.q=4", lambda run: run.adapters[1].lora.rank_pattern["q"], 4),
        ("adapters.1.sft.shuffle=no", lambda run: run.adapters[1].sft.shuffle, False),
        ("wandb.project=a=b", lambda run: run.wandb.project, "a=b"),
        ("wandb={project: p}", lambda run: run.wandb.project, "p"),
        ("threads=", lambda run: run.threads, None),
    ],
)
def test_an_override_changes_its_setting_and_no_other(write, override, read, value):
    before, after = load_run_file(write(TWO)), load_run_file("run.yaml", [override])
    assert read(after) == value
    undone = load_run_file(write(resolved_yaml(after)), _undo(before))
    assert undone == before


def _undo(before: RunFile) -> list[str]:
    data = before.model_dump(mode="json")
    return [f"{key}={json.dumps(value)}" for key, value in data.items()]


def test_later_overrides_win(write):
    run = load_run_file(write(SMALL), ["token_budget=1", "token_budget=2"])
    assert run.token_budget == 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("adapters.0.optimizer.lrr=1", "adapters.reverse.optimizer.lrr: is not a setting here"),
        ("adapters.0.optimiser.lr=1", "adapters.reverse.optimiser: is not a setting here"),
        ("adapters.0.optimizer.lr=x", "adapters.reverse.optimizer.lr: is 'x'; it must be a number"),
        ("adapters.5.seed=1", "has no '5'; it has 2 items, numbered from 0, named reverse, v1.2"),
        ("adapters.revers.seed=1", "has no 'revers'"),
        ("base.x=1", "base holds a plain value"),
        ("token_budget", "write path.to.key=value"),
        ("=3", "write path.to.key=value"),
        ("a..b=3", "write path.to.key=value"),
        ("token_budget=[1", "not valid YAML"),
    ],
)
def test_a_wrong_override_names_itself(write, override, said):
    text = message(load_run_file, write(TWO), [override])
    assert text.startswith(f"--set {override}: "), text
    assert said in text, text


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab: \n-[]{},&*!|>'\"#?<0.e~\t", max_size=30))
def test_whatever_is_written_is_refused_with_its_place(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"any\.yaml"):
        load_run_file(path)


# --- schema -----------------------------------------------------------------------------------


def test_every_setting_is_described_in_the_schema():
    schema = run_json_schema()
    models = [schema, *schema["$defs"].values()]
    bare = [
        f"{model['title']}.{name}"
        for model in models
        for name, setting in model["properties"].items()
        if not setting.get("description") and "$ref" not in setting
    ]
    assert bare == []
    assert len(models) == 19
    assert all(model["additionalProperties"] is False for model in models)
    assert schema["required"] == ["base", "out", "adapters"]
