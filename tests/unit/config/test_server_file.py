"""The server file: defaults, overrides, and errors that say where."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from manylora.config import RunFile, ServerFile, load_server_file
from manylora.types import ConfigError


def test_from_options_alone() -> None:
    server = load_server_file(None, ["base=seedling", "data_dir=here", "aliases=[a/b, c]"])
    assert server.aliases == ["a/b", "c"] and server.data_dir == Path("here")
    assert (server.host, server.port, server.max_resident) == ("127.0.0.1", 8000, None)


def test_paths_of_a_file_are_relative_to_it(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("base: seedling\ndata_dir: data\nquotas: {adapters: 3}\n")
    server = load_server_file(file)
    assert server.data_dir == tmp_path / "data" and server.quotas.adapters == 3
    assert load_server_file(file, ["data_dir=data"]).data_dir == Path("data")


def test_every_problem_is_named(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("base: seedling\ndata_dir: data\nhots: x\nlimits: {rank: 0}\n")
    with pytest.raises(ConfigError) as caught:
        load_server_file(file, ["port=99999"])
    text = str(caught.value)
    assert f"{file}:3" in text and "did you mean host" in text
    assert f"{file}:4" in text and "must be ≥ 1" in text and "≤ 65535" in text


def test_what_opens_the_engine_is_told() -> None:
    # Others than the defaults: a setting that is not handed on shows.
    settings = {
        "token_budget": "77", "dtype": "bf16", "device": "cpu", "threads": "3",
        "quantization": "int8", "activation_checkpointing": "true",
    }  # fmt: skip
    given = [f"{name}={value}" for name, value in settings.items()]
    server = load_server_file(None, ["base=seedling", "data_dir=here", *given])
    opening = server.opening()
    for name in settings:
        assert (
            getattr(opening, name)
            == getattr(server, name)
            != getattr(load_server_file(None, ["base=seedling", "data_dir=here"]), name)
        )


@pytest.mark.parametrize(
    "setting",
    [
        "max_resident", "threads", "token_budget", "port", "step_seconds", "session_seconds",
        "drain_seconds", "quotas.adapters", "quotas.checkpoint_bytes", "quotas.tokens_in_flight",
        "limits.body_bytes", "limits.rank", "limits.samples", "limits.topk",
        "saving.every_seconds", "saving.every_steps", "saving.result_hours",
        "saving.snapshot_hours",
    ],
)  # fmt: skip
def test_no_number_is_without_bound(setting: str) -> None:
    with pytest.raises(ConfigError, match=rf"{setting}: is 1000000000000000000; it must be ≤ \d+"):
        load_server_file(None, ["base=seedling", "data_dir=here", f"{setting}={10**18}"])


def _numbers(schema: dict[str, Any], where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if schema.get("type") == "integer" and "const" not in schema:
        yield where, schema
    for key, value in schema.items():
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                yield from _numbers(part, f"{where}/{key}")


@pytest.mark.parametrize("model", [ServerFile, RunFile])
def test_every_whole_number_of_a_file_has_both_ends(model: type[BaseModel]) -> None:
    """So does a setting that somebody adds."""
    found = dict(_numbers(model.model_json_schema()))
    assert len(found) > 5
    for where, schema in found.items():
        assert {"minimum", "exclusiveMinimum"} & set(schema), where
        assert {"maximum", "exclusiveMaximum"} & set(schema), where
