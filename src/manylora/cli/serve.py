"""`manylora serve` trains and samples for many clients over the Tinker wire protocol."""

from pathlib import Path
from typing import Any

import click


@click.command(
    epilog="Example: manylora serve --base seedling --data-dir ./data, then set TINKER_BASE_URL to "
    "the printed address and TINKER_API_KEY to tml-anything.",
    short_help="Train and sample for many clients over the Tinker wire protocol.",
)
@click.argument("file", metavar="[SERVER.yaml]", required=False, type=click.Path(path_type=Path))
@click.option("--base", help="`seedling`, a folder, or a hub id.")
@click.option("--alias", "aliases", multiple=True, help="A further name for the base.")
@click.option("--data-dir", help="Folder of everything that outlives the server.")
@click.option("--data-root", "data_roots", multiple=True, help="Folder of data files for runs.")
@click.option("--host", help="Address to listen on [127.0.0.1]; others need API keys.")
@click.option("--port", type=int, help="0 = any free one [8000].")
@click.option("--mesh", help="Processes of the engine, such as dp=2,tp=2 or replicas=2 [1].")
@click.option("--max-resident", type=int, help="Adapters in the engine at once.")
@click.option("--ray", metavar="ADDRESS", help="Use a Ray cluster's devices: auto or HOST:PORT.")
@click.option("--set", "overrides", multiple=True, metavar="A.B=C", help="Any other setting.")
def serve(file: Path | None, overrides: tuple[str, ...], **options: Any) -> int:
    """Train and sample for many clients over the Tinker wire protocol.

    Settings come from SERVER.yaml, if it is given; options come on top. The address is printed
    once the server truly answers. Ctrl-C or SIGTERM finishes and saves, then stops.
    """
    import json

    from manylora.config import load_server_file

    given = {name: value for name, value in options.items() if value not in (None, ())}
    texts = [
        f"{name}={json.dumps(list(value) if isinstance(value, tuple) else value)}"
        for name, value in given.items()
    ]
    settings = load_server_file(file, [*texts, *overrides])

    from manylora.service.serve import run_server

    return run_server(settings)
