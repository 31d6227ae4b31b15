"""`manylora quickstart` trains eight small adapters together on the seedling base."""

from pathlib import Path

import click


@click.command(
    epilog="Example: manylora quickstart --out runs/quickstart",
    short_help="Train eight small adapters together on the seedling base, on any laptop.",
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
@click.option("--overwrite", is_flag=True, help="Start afresh where an earlier run has written.")
def quickstart(out: Path, steps: int | None, overwrite: bool) -> int:
    """Train eight small adapters together on the seedling base, on any laptop."""
    from manylora.quickstart.run import main

    return int(main(out=out, steps=steps, overwrite=overwrite) or 0)
