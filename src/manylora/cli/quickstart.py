"""`manylora quickstart`."""

from pathlib import Path

import click


@click.command(
    epilog="Example: manylora quickstart --out runs/quickstart",
    short_help="Train a few small adapters on the seedling base, on any laptop.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/quickstart"),
    show_default=True,
    help="Folder for everything that the run writes.",
)
@click.option(
    "--steps", type=click.IntRange(min=1), help="Optimizer steps per adapter, in place of its own."
)
def quickstart(out: Path, steps: int | None) -> int:
    """Train a few small adapters on the seedling base, on any laptop."""
    from manylora.quickstart.run import main

    return int(main(out=out, steps=steps) or 0)
