"""`manylora rollout` samples a few groups, scores them, and prints them; it trains nothing."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from manylora.config import AdapterEntry, RunFile


@click.command(
    epilog="Example: manylora rollout run.yaml --adapter digits -n 4",
    short_help="Sample and score a few groups of a run file's adapter; nothing is trained.",
)
@click.argument("run_file", metavar="RUN.yaml", type=click.Path(path_type=Path))
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Change a setting.")
@click.option("--adapter", help="Whose; may be left out where only one adapter has `rl`.")
@click.option(
    "-n",
    "groups",
    type=click.IntRange(1, 1000),
    default=2,
    show_default=True,
    help="Prompts, each answered as often as group_size says.",
)
@click.option("--best", type=click.IntRange(0), default=3, show_default=True, help="To show.")
@click.option("--worst", type=click.IntRange(0), default=3, show_default=True, help="To show.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def rollout(
    run_file: Path,
    overrides: tuple[str, ...],
    adapter: str | None,
    groups: int,
    best: int,
    worst: int,
    as_json: bool,
) -> None:
    """Sample and score a few groups of a run file's adapter; nothing is trained.

    The policy is the adapter's newest training state in the run's `out`, or as it would begin.
    Prompts and seeds are those of its next step.
    """
    from manylora.cli.rollouts import report_lines, report_of
    from manylora.config import load_run_file
    from manylora.runs.kinds import kind_of
    from manylora.runs.rl.policy_trial import sample_groups
    from manylora.runs.rl.token_texts import TokenTexts
    from manylora.runs.run_folder import RunPaths
    from manylora.runs.train import Dependencies, quiet_loading

    run = load_run_file(run_file, overrides)
    entry = chosen_entry(run, adapter)
    kind_of(entry).check(entry)
    outside = Dependencies()
    with quiet_loading(), outside.open_client(run) as client:
        step, sampled = sample_groups(
            entry,
            client,
            RunPaths(run.out).adapter(entry.name),
            groups,
            newest_state=outside.newest_state,
            progress=lambda text, done, total: click.echo(f"{text} …", err=True),
        )
        texts = TokenTexts(client.tokenizer)
        report = report_of(sampled, best, worst, texts)
    told = {"adapter": entry.name, "step": step + 1, **report}
    click.echo(json.dumps(told, indent=2) if as_json else "\n".join(report_lines(told)))


def chosen_entry(run: "RunFile", name: str | None) -> "AdapterEntry":
    """Return the entry of that name, or the only one with `rl`. Raises ConfigError."""
    from manylora.types import ConfigError

    with_rl = {entry.name: entry for entry in run.adapters if entry.kind == "rl"}
    if name is None and len(with_rl) == 1:
        return next(iter(with_rl.values()))
    if name in with_rl:
        return with_rl[name]
    if not with_rl:
        raise ConfigError("no adapter of this run file has `rl`, so there is nothing to sample for")
    there = ", ".join(with_rl)
    if name is None:
        raise ConfigError(f"name one with --adapter; with rl there are {there}")
    raise ConfigError(f"no adapter {name!r} with rl is in this run file; there are {there}")
