"""`manylora schema` prints the JSON schema of run files."""

import json

import click


@click.command(
    epilog="Example: manylora schema > run.schema.json",
    short_help="Print the JSON schema of run files, for editors.",
)
def schema() -> None:
    """Print the JSON schema of run files, for editors."""
    from manylora.config import run_json_schema

    click.echo(json.dumps(run_json_schema(), indent=2, ensure_ascii=False))
