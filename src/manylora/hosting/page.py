"""A page remembers an adapter that may be anywhere, and where its files lie."""

from dataclasses import dataclass
from enum import Enum, auto

from manylora.hosting.engine_protocol import EngineProtocol
from manylora.lora.layout import Layout, plan_layout
from manylora.lora.sites import resolve_targets
from manylora.lora.state import AdapterState
from manylora.types import AdapterSpec


class PageState(Enum):
    """A `PageState` says where an adapter is, and from what it comes back. `Pager` moves it:

    | from          | to           | by                                                        |
    |---------------|--------------|-----------------------------------------------------------|
    | unregistered  | UNMADE       | `create`; `register`, if it has no state on disk          |
    | unregistered  | HELD         | `restore`                                                 |
    | unregistered  | ON_DISK      | `register`, if it has a state on disk                     |
    | UNMADE        | NEW          | `_bring_one`: made in the engine, of its settings         |
    | NEW           | RESIDENT     | `_advance`: an operation may have changed it              |
    | NEW           | UNMADE       | `_page_out`: its settings give the same adapter again     |
    | RESIDENT      | HELD         | `_page_out`, which also has the writer write the state    |
    | HELD          | ON_DISK      | `_trim`: its newest state is whole on disk                |
    | HELD, ON_DISK | RESIDENT     | `_bring_one`: restored in the engine                      |
    | any           | HELD         | `replace`                                                 |
    | any           | unregistered | `unload`; an adapter that could not be made: `create`     |

    Beside that, a state can be written (`save`) wherever the adapter is; see `AdapterPage`.
    """

    UNMADE = auto()
    NEW = auto()
    RESIDENT = auto()
    HELD = auto()
    ON_DISK = auto()

    @property
    def in_engine(self) -> bool:
        """It tells whether the engine has the adapter."""
        return self in (PageState.NEW, PageState.RESIDENT)


@dataclass(slots=True)
class AdapterPage:
    """An `AdapterPage` is one registered adapter.

    Attributes:
        state: where it is.
        content: its settings while it is UNMADE or NEW, its state while it is HELD, else None.
        position: `seq` of the last operation that it has run; 0 where they are not numbered.
        version: how often it has been changed here.
        saved: the version that its state on disk has; None if there is none.
        asked: the version of the newest state that the writer has or had in hand.
    """

    state: PageState
    content: AdapterSpec | AdapterState | None = None
    position: int = 0
    version: int = 0
    saved: int | None = None
    asked: int | None = None


def bytes_of(state: AdapterState) -> int:
    """Return how many bytes of memory a state's vectors take."""
    vectors = (state.weights, state.exp_avg, state.exp_avg_sq, state.grad)
    return sum(v.nbytes for v in vectors if v is not None)


def settings_of(
    engine: EngineProtocol, content: AdapterSpec | AdapterState
) -> tuple[AdapterSpec, Layout]:
    """Return an adapter's settings and layout, before it is made. Raises TargetError."""
    if isinstance(content, AdapterState):
        return content.spec, content.layout
    return content, plan_layout(content, resolve_targets(content, engine.sites))


def file_name(name: str) -> str:
    """Return a folder's name for an id."""
    return name.replace(":", "_").replace("/", "_")
