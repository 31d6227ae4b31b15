"""The data of submitted runs: what is taken, and that nothing outside the roots is read."""

import os
from pathlib import Path
from typing import Any

import pytest

from manylora.config import AdapterEntry
from manylora.runs.run_folder import AdapterPaths
from manylora.service.http_errors import TooLarge
from manylora.service.state.run_data import RunData, accept, check_size, find
from manylora.service.wire.run_messages import Data
from manylora.types import DataError, Unsupported

LINE = '{"prompt": "a", "completion": "b"}\n'


def entry(train: str = "x.jsonl", evaluation: str | None = None, **lora: Any) -> AdapterEntry:
    sft = {"train": train, "eval": evaluation, "max_steps": 1}
    return AdapterEntry.model_validate({"name": "a", "sft": sft, "lora": lora})


@pytest.fixture
def roots(tmp_path: Path) -> list[Path]:
    for name in ("one", "two/deep"):
        (tmp_path / "roots" / name).mkdir(parents=True)
    (tmp_path / "roots/one/a.jsonl").write_text(LINE)
    (tmp_path / "roots/two/deep/b.jsonl").write_text(LINE * 2)
    (tmp_path / "roots/secret.jsonl").write_text(LINE)
    (tmp_path / "roots/one/out.jsonl").symlink_to(tmp_path / "roots/secret.jsonl")
    (tmp_path / "roots/one/up").symlink_to(tmp_path / "roots")
    (tmp_path / "roots/one/in.jsonl").symlink_to(tmp_path / "roots/one/a.jsonl")
    return [tmp_path / "roots/one", tmp_path / "roots/two"]


def test_a_file_is_found_below_any_root(roots: list[Path]) -> None:
    assert find(roots, "a.jsonl") == roots[0] / "a.jsonl"
    assert find(roots, "deep/b.jsonl") == roots[1] / "deep/b.jsonl"
    assert find(roots, "in.jsonl") == roots[0] / "a.jsonl"


@pytest.mark.parametrize(
    "name",
    ["none.jsonl", "../secret.jsonl", "deep/../../secret.jsonl", "out.jsonl", "up/secret.jsonl",
     "up/one/../secret.jsonl", "a.jsonl\0.jsonl", "~/a.jsonl", ".jsonl"],
)  # fmt: skip
def test_nothing_outside_the_roots(roots: list[Path], name: str) -> None:
    with pytest.raises(DataError, match="no such file in the server's data folders"):
        find(roots, name)


def test_absolute_paths_and_hubs(roots: list[Path]) -> None:
    with pytest.raises(DataError, match="relative"):
        find(roots, str(roots[0] / "a.jsonl"))
    with pytest.raises(DataError, match="no such file"):
        find([], "a.jsonl")
    with pytest.raises(Unsupported, match="from a hub"):
        find(roots, "org/name")


def test_a_file_that_changes_after_it_was_accepted(roots: list[Path], tmp_path: Path) -> None:
    paths, named = AdapterPaths(tmp_path / "run"), entry("a.jsonl", "deep/b.jsonl")
    stamps = accept(named, None, paths, roots)
    data = RunData(named, paths, roots, stamps)
    assert (len(data.read("train")), len(data.read("eval"))) == (1, 2)
    assert data.read("eval").name == "deep/b.jsonl"
    os.utime(roots[0] / "a.jsonl", ns=(0, 0))
    with pytest.raises(DataError, match=r"a\.jsonl: has changed since"):
        data.read("train")
    assert not paths.root.exists()


def test_uploaded_lines_are_named_as_the_client_names_them(tmp_path: Path) -> None:
    paths, named = AdapterPaths(tmp_path / "run"), entry("mine/a.jsonl", "mine/b.parquet")
    uploaded = Data(train=f"{LINE}\n{LINE}", eval=f"{LINE}[]\n")
    data = RunData(named, paths, [], accept(named, uploaded, paths, []))
    assert [example.line for example in data.read("train").examples] == [1, 3]
    with pytest.raises(DataError, match=r"^mine/b\.parquet:2: is an empty list"):
        data.read("eval")
    data.forget()
    assert list(paths.root.iterdir()) == []


def test_evaluation_data_come_with_their_name(tmp_path: Path) -> None:
    paths = AdapterPaths(tmp_path / "run")
    for named, data in (
        (entry("a.jsonl", "b.jsonl"), Data(train=LINE)),
        (entry("a.jsonl"), Data(train=LINE, eval=LINE)),
    ):
        with pytest.raises(DataError, match="go together"):
            accept(named, data, paths, [])


@pytest.mark.parametrize(
    ("lora", "error"),
    [
        ({"rank": 17}, TooLarge),
        ({"rank_pattern": {"q_proj": 17}}, TooLarge),
        ({"init_from": "somewhere"}, Unsupported),
        ({"targets": ".*_proj"}, Unsupported),
        ({"targets": ["q_proj", "(a+)+"]}, Unsupported),
        ({"alpha_pattern": {"(a|a)*b": 2.0}}, Unsupported),
    ],
)
def test_what_a_shared_server_does_not_take(lora: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        check_size(entry(**lora), 16)
    check_size(entry(rank=16, targets=["q_proj", "mlp.up_proj"], rank_pattern={"q_proj": 2}), 16)


@pytest.mark.parametrize("template", ["/etc/passwd", "{% for i in range(9) %}x{% endfor %}"])
def test_a_chat_template_is_neither_read_nor_run(template: str) -> None:
    settings = {"name": "a", "sft": {"train": "x.jsonl"}, "chat_template": template}
    with pytest.raises(Unsupported, match="a template is a program"):
        check_size(AdapterEntry.model_validate(settings), 16)


@pytest.mark.parametrize("code", [{"reward": "os:getcwd"}, {"rollout": "os:getcwd"}])
def test_nobodys_code_is_run(code: dict[str, str]) -> None:
    settings = {"name": "a", "rl": {"prompts": "words.jsonl", **code}}
    with pytest.raises(Unsupported, match="rewards and hooks are programs"):
        check_size(AdapterEntry.model_validate(settings), 16)
