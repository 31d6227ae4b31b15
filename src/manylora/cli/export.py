"""`manylora export`."""

from pathlib import Path

import click


@click.command(
    epilog="Example: manylora export runs/quickstart/reverse ./reverse-merged --merged",
    short_help="Write an adapter as PEFT files, or merged into its base.",
)
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--merged", is_flag=True, help="Write the whole base with the adapter added to it.")
@click.option("--base", help="Base model; by default the one that the adapter names.")
def export(source: Path, folder: Path, merged: bool, base: str | None) -> None:
    """Write an adapter as PEFT files, or merged into its base.

    SRC is a PEFT folder, a training state step-N, or an adapter's folder of a run. DIR must not
    exist yet, or be empty.
    """
    from manylora.cli.adapters import common_base, find_adapter, open_adapter
    from manylora.types import ConfigError

    adapter = find_adapter(source)
    name = common_base([adapter], base)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: is there already; name a new folder")

    from manylora.api import Trainer

    with Trainer(name) as trainer:
        written = open_adapter(trainer, "export", adapter).export(folder, merged=merged).result()
    click.echo(str(written))
