"""The engine's verbs are declared once; engines, the pager and the worker's runner keep to that.

Seen to fail with a parameter of `RemoteEngine.poison` renamed, with `Engine.cancel` gone, and with
`Pager.snapshot` taking the position first.
"""

from inspect import Parameter, signature
from typing import Any

import pytest

from manylora.engine import Engine
from manylora.hosting.engine_protocol import VERBS, EngineProtocol
from manylora.hosting.pager import Pager
from manylora.processes import RemoteEngine
from manylora.scheduler import Runner

# What the type checker compares: whole signatures, results and properties included.
ENGINES: tuple[type[EngineProtocol], ...] = (Engine, RemoteEngine)
RUNNERS: tuple[type[Runner], ...] = (Pager, *ENGINES)


def parameters(owner: type[Any], verb: str) -> list[Parameter]:
    return list(signature(getattr(owner, verb)).parameters.values())


def properties(protocol: type[Any]) -> set[str]:
    return {
        name
        for one in protocol.__mro__
        for name, member in vars(one).items()
        if isinstance(member, property)
    }


def test_the_verbs_are_those_of_both_declarations():
    assert {"create", "forward_backward", "decode", "drop_snapshot"} <= VERBS
    assert not VERBS & properties(EngineProtocol)
    assert {verb for verb in VERBS if verb in vars(Runner)} == {
        *("forward_backward", "optim_step"),
        *("admit", "decode", "cancel", "interrupt"),
    }


@pytest.mark.parametrize("verb", sorted(VERBS))
@pytest.mark.parametrize("engine", ENGINES)
def test_engines_take_what_the_protocol_says(engine: type[Any], verb: str):
    assert parameters(engine, verb) == parameters(EngineProtocol, verb)


def test_engines_have_the_properties_of_the_protocol():
    wanted = properties(EngineProtocol) - {"base", "sites", "adapters", "snapshots"}  # of objects
    assert wanted == {"tokenizer", "free_bytes", "room_bytes", "decoding"}
    assert [name for one in ENGINES for name in wanted if not hasattr(one, name)] == []


@pytest.mark.parametrize("verb", sorted(VERBS.intersection(dir(Pager))))
def test_the_pager_takes_what_the_engine_takes_and_perhaps_a_position_behind(verb: str):
    wanted, found = parameters(EngineProtocol, verb), parameters(Pager, verb)
    assert found[: len(wanted)] == wanted
    assert not (verb in vars(Runner) and len(found) > len(wanted))
