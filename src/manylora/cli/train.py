"""`manylora train` trains all adapters of a run file."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from manylora.config import RunFile
    from manylora.runs.footprint import MemoryPlan
    from manylora.runs.measure import Measured
    from manylora.runs.run_plan import RunPlan


@click.command(
    epilog="Example: manylora train run.yaml --set adapters.reverse.optimizer.lr=1e-3",
    short_help="Train all adapters of a run file; goes on where it was stopped.",
)
@click.argument("run_file", metavar="RUN.yaml", type=click.Path(path_type=Path))
@click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="Change a setting, such as token_budget=2048 or adapters.NAME.sft.max_steps=5. "
    "May be repeated.",
)
@click.option("--mesh", help="Processes, such as dp=2,tp=2 or replicas=2 [1].")
@click.option("--ray", metavar="ADDRESS", help="Use a Ray cluster's devices: auto or HOST:PORT.")
@click.option("--overwrite", is_flag=True, help="Delete what an earlier run left in `out`.")
@click.option("--dry-run", is_flag=True, help="Show what would be trained, and stop.")
@click.option(
    "--measure",
    is_flag=True,
    help="With --dry-run: make a few steps, keep nothing, and tell memory and time.",
)
@click.option("--json", "as_json", is_flag=True, help="Print events (or the plan) as JSON.")
def train(
    run_file: Path,
    overrides: tuple[str, ...],
    mesh: str | None,
    ray: str | None,
    overwrite: bool,
    dry_run: bool,
    measure: bool,
    as_json: bool,
) -> int:
    """Train all adapters of a run file; goes on where it was stopped."""
    if measure and not dry_run:
        raise click.UsageError("--measure goes with --dry-run: it trains nothing that is kept")
    from manylora.config import load_run_file
    from manylora.types.mesh_shape import MeshShape

    given = {"mesh": mesh, "ray": ray}
    options = [f"{name}={json.dumps(value)}" for name, value in given.items() if value is not None]
    run = load_run_file(run_file, (*overrides, *options))
    if dry_run:
        return dry_run_of(run, measure=measure, as_json=as_json)
    from manylora.processes.external_start import started_by_others

    started = started_by_others()
    if started is not None:
        started.check(MeshShape.parse(run.mesh))
        if started.world_rank > 0:
            started.serve(run.out)
            return 0
    from manylora.runs.train import train_run_file

    return int(train_run_file(run, overwrite=overwrite, view="json" if as_json else "auto"))


def dry_run_of(run: "RunFile", *, measure: bool, as_json: bool) -> int:
    """Print what would be trained, and what was measured of it; return the exit code."""
    from manylora.runs.run_plan import plan_run

    plan, measured = planned_and_measured(run) if measure else (plan_run(run), None)
    if as_json:
        told = {"measured": asdict(measured)} if measured is not None else {}
        click.echo(json.dumps({**plan.to_json(), **told}, indent=2))
    else:
        click.echo(plan_text(plan, measured))
    for warning in plan.warnings():
        click.echo(f"warning: {warning}", err=True)
    refusal = plan.memory.refusal()
    if refusal is not None:
        raise refusal
    errors = [str(error) for error in plan.faults.values()]
    for name, times in measured.adapters.items() if measured is not None else ():
        if times.error is not None:
            errors.append(f"adapter {name}: {times.error['message']}")
    for error in errors:
        click.echo(f"error: {error}", err=True)
    return 1 if errors else 0


def planned_and_measured(run: "RunFile") -> tuple["RunPlan", "Measured | None"]:
    """Return the plan and, if it can fit, what was measured of it; progress goes to stderr."""
    from manylora.processes.external_start import started_by_others
    from manylora.runs.events import Listeners, Phase
    from manylora.runs.measure import measure_run
    from manylora.runs.run_plan import plan_run
    from manylora.runs.view import open_view
    from manylora.types import ConfigError

    if started_by_others() is not None:
        raise ConfigError("--measure starts the mesh itself; run it once, without torchrun or srun")
    with open_view("auto") as view:
        emit = Listeners([view])
        emit(Phase("", "planning"))
        plan = plan_run(run, apart=True)
        emit(Phase("", ""))
        if plan.memory.refusal() is not None:
            return plan, None
        tokens = {adapter.name: adapter.num_tokens for adapter in plan.adapters}
        whole = [entry for entry in run.adapters if entry.name in tokens]
        return plan, measure_run(run.model_copy(update={"adapters": whole}), tokens, emit=emit)


def plan_text(plan: "RunPlan", measured: "Measured | None" = None) -> str:
    """Return the plan, and what was measured of it, as tables for people."""
    from manylora.types.memory import bytes_text

    context = f", context {plan.context_length}" if plan.context_length else ""
    head = f"base {plan.base}: {plan.architecture}, {plan.base_params:,} parameters{context}"
    titles = (
        *("adapter", "rank", "layers", "parameters", "memory", "examples", "eval", "batch"),
        *("steps", "tokens", "longest"),
    )
    rows = [
        (
            adapter.name,
            "–".join(map(str, dict.fromkeys(adapter.rank))),
            str(adapter.num_targets),
            f"{adapter.num_params:,}",
            bytes_text(adapter.num_bytes),
            f"{adapter.num_examples:,}",
            f"{adapter.num_eval_examples:,}",
            f"{adapter.batch_size:,}",
            f"{adapter.steps:,}",
            f"{adapter.num_tokens:,}",
            f"{adapter.longest:,}",
        )
        for adapter in plan.adapters
    ]
    rows += [(name, "cannot be planned", *[""] * (len(titles) - 2)) for name in plan.faults]
    told = [] if measured is None else measured_lines(measured)
    return "\n".join(
        [head, "", *table(titles, rows), "", *memory_lines(plan.memory), *told, f"out: {plan.out}"]
    )


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table whose first column is text."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (titles, *rows)
    ]


def measured_lines(measured: "Measured") -> list[str]:
    """Return lines that tell memory and time as they were measured."""
    from manylora.runs.board import clock_text
    from manylora.types.memory import bytes_text

    titles = ("measured", "seconds a step", "its share", "training", "evaluations")
    rows = [
        (
            name,
            f"{times.step_seconds:.3g}",
            f"{times.share_seconds:.3g}",
            clock_text(times.training_seconds),
            clock_text(times.evaluation_seconds),
        )
        if times.error is None
        else (name, times.error["type"], "", "", "")
        for name, times in measured.adapters.items()
    ]
    training, evaluation = measured.training_seconds, measured.evaluation_seconds
    seconds = (f"{measured.step_seconds:.3g}", clock_text(training), clock_text(evaluation))
    peak = f"measured peak of memory: {bytes_text(measured.peak)}"
    if measured.others_peak:
        peak += f"; of the other processes at most {bytes_text(measured.others_peak)}"
    return [*table(titles, [*rows, ("all", "", *seconds)]), "", peak, ""]


def memory_lines(memory: "MemoryPlan") -> list[str]:
    """Return lines that tell the memory of a process, part by part."""
    from manylora.types.memory import bytes_text

    other = memory.recomputed if memory.activations == memory.plain else memory.plain
    way = "with" if memory.activations == memory.plain else "without"
    activations = bytes_text(memory.activations)
    if other:
        activations += f" ({bytes_text(other)} {way} activation_checkpointing)"
    rows = [
        ("interpreter, libraries, data", bytes_text(memory.process)),
        ("  what these grow by", bytes_text(memory.libraries)),
        ("base", bytes_text(memory.base)),
        ("adapters with optimizer", bytes_text(memory.adapters)),
        ("activations", activations),
    ]
    if memory.decode_weights:
        rows.append(("base once more, to sample", bytes_text(memory.decode_weights)))
    if memory.decode_cache:
        rows.append(("decode cache of evaluation", bytes_text(memory.decode_cache)))
    each = f" in each of {memory.ranks} processes" if memory.ranks > 1 else ""
    rows.append((f"at the peak{each}", f"about {bytes_text(memory.total)}"))
    width = max(len(title) for title, _ in rows)
    return ["memory", *(f"  {title.ljust(width)}  {text}" for title, text in rows), ""]
