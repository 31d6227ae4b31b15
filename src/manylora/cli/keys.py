"""`manylora keys` makes, lists and revokes API keys of a server."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

_DATA_DIR = click.option(
    "--data-dir", required=True, type=click.Path(path_type=Path), help="The server's data folder."
)
_DATABASE = click.option("--database", help="SQLAlchemy URL, if the server has another database.")


@click.group(
    epilog="Example: manylora keys create alice --data-dir ./data",
    short_help="Make, list and revoke API keys of a server.",
)
def keys() -> None:
    """Make, list and revoke API keys of a server, running or not."""


@keys.command()
@click.argument("tenant")
@_DATA_DIR
@_DATABASE
def create(tenant: str, data_dir: Path, database: str | None) -> None:
    """Make a key for TENANT. It is shown once, and stored as a hash."""
    with _store(data_dir, database) as store:
        click.echo(store.keys.create(tenant))


@keys.command("list")
@click.argument("tenant", required=False)
@_DATA_DIR
@_DATABASE
def list_keys(tenant: str | None, data_dir: Path, database: str | None) -> None:
    """List keys, of TENANT or of all: how they begin, and whether they are revoked."""
    with _store(data_dir, database) as store:
        for row in store.keys.of(tenant):
            made = datetime.fromtimestamp(row.created_at, UTC).strftime("%Y-%m-%d %H:%M")
            state = "revoked" if row.revoked_at is not None else "active"
            click.echo(f"{row.prefix}…  {row.tenant}  {made}  {state}")


@keys.command()
@click.argument("tenant")
@click.argument("key", required=False)
@_DATA_DIR
@_DATABASE
def revoke(tenant: str, key: str | None, data_dir: Path, database: str | None) -> None:
    """Revoke all keys of TENANT, or the one that begins with KEY."""
    from manylora.types import ConfigError

    with _store(data_dir, database) as store:
        count = store.keys.revoke(tenant, key)
    if not count:
        raise ConfigError(f"tenant {tenant!r} has no such key; see: manylora keys list")
    click.echo(f"revoked {count}")


def _store(data_dir: Path, database: str | None) -> Any:
    from manylora.store import Store

    return Store.in_folder(data_dir, database)
