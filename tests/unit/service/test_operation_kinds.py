"""The one table of numbered requests agrees with the messages, the routes and what is done.

Faults that were planted and seen to fail here: a row taken out of the table, a route taken out, a
case of `Operations` taken out, and a column turned round.
"""

from typing import Any

import pytest

from manylora.service.state.wire_operations import Load, Operations
from manylora.service.wire.codec import decode_forward_backward
from manylora.service.wire.messages import (
    KIND_OF_MESSAGE,
    KINDS,
    REFUSED,
    LoadWeightsRequest,
    Numbered,
    OptimStepRequest,
    SaveWeightsExternalRequest,
    SaveWeightsForSamplerRequest,
    SaveWeightsRequest,
    WireAdamParams,
)
from manylora.service.wire.wire_limits import WireLimits
from tests.route_table import routes
from tests.unit.service import bodies
from tests.unit.service.client import application
from tests.unit.service.fake_hub import FakeHub


def numbered(kind: Any, **more: Any) -> Any:
    return kind(model_id="m", seq_id=1, **more)


def forward_backward(*, forward_only: bool) -> Any:
    body = bodies.request([bodies.plain_datum()], model_id="m", seq_id=1)
    body.forward_only = forward_only
    return decode_forward_backward(body.SerializeToString(), WireLimits())


LOAD: Any = Load(LoadWeightsRequest(path="p", optimizer=True, model_id="m", seq_id=1), None)  # pyrefly: ignore[bad-argument-type]
# Kind, content, whether it leaves no trace, and the number of the sampler that it makes.
CASES = (
    ("forward_backward", forward_backward(forward_only=False), False, None),
    ("forward_backward", forward_backward(forward_only=True), True, None),
    ("optim_step", numbered(OptimStepRequest, adam_params=WireAdamParams()), False, None),
    ("save_weights", numbered(SaveWeightsRequest), True, None),
    ("save_weights_for_sampler", numbered(SaveWeightsForSamplerRequest, path="p"), True, None),
    (
        "save_weights_for_sampler",
        numbered(SaveWeightsForSamplerRequest, sampling_session_seq_id=0),
        False,
        0,
    ),
    ("save_weights_external", numbered(SaveWeightsExternalRequest, path="p"), True, None),
    ("load_weights", LOAD, False, None),
)


def test_every_numbered_message_and_every_route_has_its_kind():
    assert {*Numbered.__subclasses__(), LoadWeightsRequest} == set(KIND_OF_MESSAGE)
    assert {("POST", f"/api/v1/{name}") for name in KINDS} <= set(routes(application(FakeHub())))
    assert REFUSED.name not in KINDS
    assert {name for name, *_ in CASES} == set(KINDS)


@pytest.mark.parametrize(("name", "content", "leaves_no_trace", "sampler"), CASES)
def test_what_is_known_of_a_kind_and_what_it_does(
    name: str,
    content: Any,
    leaves_no_trace: bool,
    sampler: int | None,
    monkeypatch: pytest.MonkeyPatch,
):
    kind = KINDS[name]
    assert kind.leaves_no_trace(content) is leaves_no_trace
    assert kind.sampler(content) == sampler
    done: list[str] = []
    nothing: Any = None
    for other in KINDS:
        monkeypatch.setattr(Operations, f"_{other}", lambda *_, other=other: done.append(other))
    Operations(nothing, nothing, nothing)._handed_over(nothing, 1, content)
    assert done == [name]
