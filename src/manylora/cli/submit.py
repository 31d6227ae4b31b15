"""`manylora submit` has a server train the adapters of a run file."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from manylora.cli.options import KEY_FILE, URL

if TYPE_CHECKING:
    from manylora.config import AdapterEntry, RunFile


@click.command(
    epilog="Example: manylora submit run.yaml --url http://127.0.0.1:8000 --adapter reverse",
    short_help="Have a server train the adapters of a run file, and follow them.",
)
@click.argument("run_file", metavar="RUN.yaml", type=click.Path(path_type=Path))
@URL
@KEY_FILE
@click.option("--adapter", "names", metavar="NAME", multiple=True, help="Only this one, or these.")
@click.option(
    "--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Change a setting, as for train."
)
@click.option("--json", "as_json", is_flag=True, help="Print events as JSON, as train does.")
def submit(
    run_file: Path,
    url: str,
    key_file: Path | None,
    names: tuple[str, ...],
    overrides: tuple[str, ...],
    as_json: bool,
) -> int:
    """Have a server train the adapters of a run file, and follow them.

    The data are read here and sent along. Each adapter is a run of its own on the server, which
    goes on when this command is stopped. Exit codes are those of train. What concerns a whole
    process (`out`, `token_budget`, `device`, trackers) is the server's affair and is not sent.
    """
    from manylora.cli.following import Following
    from manylora.cli.server_client import Client
    from manylora.config import load_run_file
    from manylora.runs.stopping import EXIT_INTERRUPTED

    run = load_run_file(run_file, overrides)
    client = Client(url, key_file)
    following = Following(client, run, run_file.resolve().parent, as_json=as_json)
    try:
        return following.go(_chosen(run, names))
    except KeyboardInterrupt:
        for name, run_id in following.unfinished():
            click.echo(f"{name} goes on; to cancel: manylora runs delete {run_id}", err=True)
        return EXIT_INTERRUPTED


def _chosen(run: "RunFile", names: tuple[str, ...]) -> "list[AdapterEntry]":
    from manylora.types import ConfigError

    there = {entry.name: entry for entry in run.adapters}
    for name in names:
        if name not in there:
            raise ConfigError(f"--adapter {name}: the run file has {', '.join(there)}")
    return [entry for name, entry in there.items() if not names or name in names]
