"""An adapter's files are states that fit the base that is open, and PEFT's files."""

import dataclasses
from pathlib import Path

from manylora.checkpoint import SavedState, export_peft, load_state, save_state
from manylora.hosting.engine_protocol import EngineProtocol
from manylora.lora.layout import Factor, plan_layout
from manylora.lora.sites import resolve_targets
from manylora.lora.state import AdapterState
from manylora.types import (
    AdapterSpec,
    CheckpointError,
    CheckpointMismatch,
    TextFormat,
    TooManyFilesOpen,
)


def read_state(
    engine: EngineProtocol,
    folder: Path,
    *,
    spec: AdapterSpec | None = None,
    called: str | None = None,
) -> SavedState:
    """Read a training state from its files, with the layout of the engine's base.

    Args:
        spec: the settings that the caller expects; others are refused.
        called: what an error calls the folder, where its reader shall not learn the path.

    Raises CheckpointDamaged, CheckpointMismatch, TooManyFilesOpen.
    """
    try:
        return _read(engine, folder, spec)
    except (CheckpointError, TooManyFilesOpen) as error:
        if called is None:
            raise
        raise type(error)(str(error).replace(str(folder), called)) from error


def _read(engine: EngineProtocol, folder: Path, spec: AdapterSpec | None) -> SavedState:
    saved = load_state(folder, spec=spec, base_fingerprint=engine.base.fingerprint)
    # Planned anew, because input groups are numbered by the base that is open.
    layout = plan_layout(saved.state.spec, resolve_targets(saved.state.spec, engine.sites))
    if {term(f) for f in layout.factors} != {term(f) for f in saved.state.layout.factors}:
        raise CheckpointMismatch(f"{folder}: its layers are not those of {engine.base.name!r}")
    return dataclasses.replace(saved, state=dataclasses.replace(saved.state, layout=layout))


def write_state(
    engine: EngineProtocol, folder: Path, state: AdapterState, *, position: int
) -> None:
    """Write a training state, with the `seq` of the last operation in it. Raises SaveFailed."""
    base = engine.base
    save_state(
        folder,
        state,
        base_name=base.name,
        base_fingerprint=base.fingerprint,
        client={"seq": position},
    )


def write_peft(
    engine: EngineProtocol, folder: Path, state: AdapterState, text_format: TextFormat | None = None
) -> None:
    """Write an adapter's weights as PEFT's files. Raises SaveFailed."""
    base = engine.base
    export_peft(
        folder,
        state.spec,
        state.layout,
        state.weights,
        base_name=base.name,
        sites=engine.sites,
        base_fingerprint=base.fingerprint,
        text_format=text_format,
    )


def weights_only(state: AdapterState) -> AdapterState:
    """Return a state's adapter before its first step: no moments, no gradient, no counters."""
    return AdapterState(state.spec, state.layout, state.weights)


def term(factor: Factor) -> tuple[str, int, float]:
    """Return a factor's term: its site, its rank and its scale."""
    return factor.site, factor.rank, round(factor.scale, 9)
