"""`manylora adapters`, `runs` and `checkpoints` list what a tenant has on a server."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from manylora.cli.options import KEY_FILE, URL

if TYPE_CHECKING:
    from manylora.cli.server_client import Client

PAGE = 1000
SCHEME = "tinker://"

Titles = Mapping[str, str]


def on_server(command: Callable[..., None]) -> Callable[..., None]:
    """Have a command take the options that name a server and a key as a `client`, and `--json`."""

    @URL
    @KEY_FILE
    @click.option("--json", "as_json", is_flag=True, help="Print JSON.")
    @wraps(command)
    def call(url: str, key_file: Path | None, **arguments: Any) -> None:
        from manylora.cli.server_client import Client

        command(Client(url, key_file), **arguments)

    return call


def _part(text: str) -> str:
    """Return a text as one part of a path."""
    return quote(text, safe="")


def _all(client: "Client", kind: str) -> list[dict[str, Any]]:
    """Return every item of a list that comes in pages."""
    found: list[dict[str, Any]] = []
    while True:
        answer = client.get(f"{kind}?limit={PAGE}&offset={len(found)}")
        items = answer[kind]
        found += items
        total = answer.get("cursor", {}).get("total_count", 0)
        if not items or len(found) >= total:
            return found


def _print(items: Sequence[Mapping[str, Any]], titles: Titles, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(items, indent=2, ensure_ascii=False))
        return
    rows = [tuple(titles.values())]
    rows += [tuple(_cell(item.get(key)) for key in titles) for item in items]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows if items else []:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


def _print_one(item: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(item, indent=2, ensure_ascii=False))
        return
    for key, value in item.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {_cell(inner)}" for name, inner in value.items())
        if value is not None and key != "metrics":
            click.echo(f"{key}: {_cell(value)}")


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


# -- adapters -------------------------------------------------------------------------------------


@click.group(
    epilog="Example: manylora adapters list --url http://127.0.0.1:8000",
    short_help="List, show and close the adapters that are open on a server.",
)
def adapters() -> None:
    """List, show and close the adapters that are open on a server."""


@adapters.command("list")
@on_server
def list_adapters(client: "Client", as_json: bool) -> None:
    """List the adapters that clients have open."""
    items = client.get("adapters")["adapters"]
    titles = {"adapter_id": "adapter", "rank": "rank", "step": "step", "created_at": "made"}
    _print(items, titles, as_json=as_json)


@adapters.command("show")
@click.argument("adapter")
@on_server
def show_adapter(client: "Client", adapter: str, as_json: bool) -> None:
    """Show an open ADAPTER."""
    _print_one(client.get(f"adapters/{_part(adapter)}"), as_json=as_json)


@adapters.command("delete")
@click.argument("adapter")
@on_server
def delete_adapter(client: "Client", adapter: str, as_json: bool) -> None:
    """Close ADAPTER; what it has learned since it was last saved becomes its checkpoint `last`."""
    _print_one(client.call("DELETE", f"adapters/{_part(adapter)}"), as_json=as_json)


# -- runs -----------------------------------------------------------------------------------------


@click.group(
    epilog="Example: manylora runs list --url http://127.0.0.1:8000",
    short_help="List, show and cancel the runs that a server trains.",
)
def runs() -> None:
    """List, show and cancel the runs that a server trains; see also manylora submit."""


@runs.command("list")
@on_server
def list_runs(client: "Client", as_json: bool) -> None:
    """List runs, the newest first."""
    titles = {"id": "run", "name": "adapter", "status": "status", "step": "step", "steps": "of"}
    titles |= {"last_loss": "loss", "path": "checkpoint"}
    _print(_all(client, "runs"), titles, as_json=as_json)


@runs.command("show")
@click.argument("run")
@on_server
def show_run(client: "Client", run: str, as_json: bool) -> None:
    """Show RUN; as JSON with the figures of its last steps."""
    _print_one(client.get(f"runs/{_part(run)}"), as_json=as_json)


@runs.command("delete")
@click.argument("run")
@on_server
def delete_run(client: "Client", run: str, as_json: bool) -> None:
    """Cancel RUN and keep what it has learned; one that is over stays as it is."""
    _print_one(client.call("DELETE", f"runs/{_part(run)}"), as_json=as_json)


# -- checkpoints ----------------------------------------------------------------------------------


@click.group(
    epilog="Example: manylora checkpoints list --url http://127.0.0.1:8000",
    short_help="List, show and delete checkpoints on a server.",
)
def checkpoints() -> None:
    """List, show and delete checkpoints on a server; see also manylora export."""


@checkpoints.command("list")
@on_server
def list_checkpoints(client: "Client", as_json: bool) -> None:
    """List checkpoints, the newest first."""
    titles = {"tinker_path": "checkpoint", "size_bytes": "bytes", "time": "made"}
    _print(_all(client, "checkpoints"), titles, as_json=as_json)


@checkpoints.command("show")
@click.argument("path", metavar="tinker://…")
@on_server
def show_checkpoint(client: "Client", path: str, as_json: bool) -> None:
    """Show a checkpoint."""
    run, _ = _apart(path)
    from manylora.cli.server_client import Refused

    about = client.call("POST", "weights_info", {"tinker_path": path})
    items: list[dict[str, Any]] = []
    with suppress(Refused):  # another user's, which is public
        items = client.get(f"training_runs/{_part(run)}/checkpoints")["checkpoints"]
    own = [item for item in items if item["tinker_path"] == path]
    _print_one({"tinker_path": path, **(own[0] if own else {}), **about}, as_json=as_json)


@checkpoints.command("delete")
@click.argument("path", metavar="tinker://…")
@on_server
def delete_checkpoint(client: "Client", path: str, as_json: bool) -> None:
    """Delete a checkpoint and its files."""
    run, name = _apart(path)
    client.call("DELETE", f"training_runs/{_part(run)}/checkpoints/{name}")
    _print_one({"deleted": path}, as_json=as_json)


def _apart(path: str) -> tuple[str, str]:
    """Return the training run and the rest of a checkpoint's path."""
    run, _, name = path.removeprefix(SCHEME).partition("/")
    kind, _, rest = name.partition("/")
    from manylora.types import ConfigError

    if not path.startswith(SCHEME) or not run or not kind or not rest or "/" in rest:
        raise ConfigError(f"{path!r} is no checkpoint; a path is {SCHEME}RUN/KIND/NAME")
    return run, f"{_part(kind)}/{_part(rest)}"
