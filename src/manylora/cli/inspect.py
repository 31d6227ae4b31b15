"""`manylora inspect` says what an adapter folder holds and whether it is whole."""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import click


@click.command(
    epilog="Example: manylora inspect runs/quickstart/reverse/final",
    short_help="Say what an adapter folder holds and whether it is whole.",
)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(folder: Path, as_json: bool) -> None:
    """Say what an adapter folder holds and whether it is whole."""
    from manylora.checkpoint import describe
    from manylora.cli.adapter_folder import find_adapter
    from manylora.types import CheckpointDamaged

    found: Mapping[str, Any]
    try:
        found = describe(folder)
    except CheckpointDamaged:
        # Perhaps an adapter's folder of a run; if it is not, this says what would be right.
        found = describe(find_adapter(folder).folder)
    if as_json:
        click.echo(json.dumps(found, indent=2, ensure_ascii=False, default=str))
    else:
        click.echo("\n".join(_lines(found)))


def _lines(found: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    for key, value in found.items():
        if value is None:
            continue
        if isinstance(value, Mapping) and value:
            yield f"{indent}{key}:"
            yield from _lines(value, indent + "  ")
        elif isinstance(value, int) and not isinstance(value, bool):
            yield f"{indent}{key}: {value:,}"
        else:
            yield f"{indent}{key}: {_shown(value)}"


def _shown(value: object) -> str:
    if isinstance(value, Collection) and not isinstance(value, str):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
