"""What is remembered of an adapter that may be anywhere, and where its files lie."""

from dataclasses import dataclass

from manylora.hosting.engine_protocol import EngineProtocol
from manylora.lora.layout import Layout, plan_layout
from manylora.lora.sites import resolve_targets
from manylora.lora.state import AdapterState
from manylora.types import AdapterSpec


@dataclass(slots=True)
class AdapterPage:
    """One registered adapter.

    Attributes:
        fresh: its settings, while nothing about it has to be remembered but these.
        held: its state, if it is in host memory.
        position: `seq` of the last operation that it has run; 0 where they are not numbered.
        version: how often it has been changed here.
        saved: the version that its state on disk has; None if there is none.
        asked: the version of the newest state that the writer has or had in hand.
    """

    fresh: AdapterSpec | None = None
    held: AdapterState | None = None
    position: int = 0
    version: int = 0
    saved: int | None = None
    asked: int | None = None


def bytes_of(state: AdapterState) -> int:
    """Memory of a state's vectors."""
    vectors = (state.weights, state.exp_avg, state.exp_avg_sq, state.grad)
    return sum(v.nbytes for v in vectors if v is not None)


def settings_of(
    engine: EngineProtocol, page: AdapterPage, state: AdapterState | None
) -> tuple[AdapterSpec, Layout]:
    """An adapter's settings and layout, before it is made. Raises TargetError."""
    if state is not None:
        return state.spec, state.layout
    assert page.fresh is not None
    return page.fresh, plan_layout(page.fresh, resolve_targets(page.fresh, engine.sites))


def file_name(name: str) -> str:
    """A folder's name for an id."""
    return name.replace(":", "_").replace("/", "_")
