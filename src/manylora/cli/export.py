"""`manylora export` writes an adapter as PEFT files, or merged into its base."""

from pathlib import Path

import click


@click.command(
    epilog="Example: manylora export runs/quickstart/reverse ./reverse-merged --merged",
    short_help="Write an adapter as PEFT files, or merged into its base.",
)
@click.argument("source", metavar="SRC")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--merged", is_flag=True, help="Write the whole base with the adapter added to it.")
@click.option("--base", help="Base model; by default the one that the adapter names.")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="A server's data folder; SRC is then a tinker:// path.",
)
@click.option("--database", help="SQLAlchemy URL, if that server has another database.")
def export(
    source: str,
    folder: Path,
    merged: bool,
    base: str | None,
    data_dir: Path | None,
    database: str | None,
) -> None:
    """Write an adapter as PEFT files, or merged into its base.

    SRC is a PEFT folder, a training state step-N, or an adapter's folder of a run; or, with
    --data-dir, the tinker:// path of a checkpoint of that server, running or not. DIR must not
    exist yet, or be empty.
    """
    from manylora.cli.adapter_folder import common_base, find_adapter, find_checkpoint, open_adapter
    from manylora.types import ConfigError

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: is there already; name a new folder")
    if source.startswith("tinker://"):
        if data_dir is None:
            raise ConfigError("a tinker:// path needs --data-dir, the data folder of its server")
        adapter = find_adapter(find_checkpoint(source, data_dir, database))
    else:
        adapter = find_adapter(Path(source))
    name = common_base([adapter], base)

    from manylora.api import Trainer

    with Trainer(name) as trainer:
        written = open_adapter(trainer, "export", adapter).export(folder, merged=merged).result()
    click.echo(str(written))
