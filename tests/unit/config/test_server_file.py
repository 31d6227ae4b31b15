"""The server file: defaults, overrides, and errors that say where."""

from pathlib import Path

import pytest

from manylora.config import load_server_file
from manylora.service.engines import opening_of
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
    opening = opening_of(server)
    for name in settings:
        assert (
            getattr(opening, name)
            == getattr(server, name)
            != getattr(load_server_file(None, ["base=seedling", "data_dir=here"]), name)
        )
