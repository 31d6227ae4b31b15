"""`manylora rollouts` prints what an adapter sampled for a step, and what it got for it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from manylora.runs.rl.kept_rollouts import Group, KeptSample
    from manylora.runs.rl.token_texts import TokenTexts
    from manylora.runs.run_folder import RunPaths

# A run or an adapter may have very many; a message names the first ones.
MOST_NAMED = 12
COUNT = click.IntRange(min=0)


@click.command(
    epilog="Example: manylora rollouts runs/rl --adapter digits --step 10 --best 5",
    short_help="Print the best and the worst samples of a step of reinforcement learning.",
)
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--adapter", help="Whose samples; may be left out where only one adapter has some.")
@click.option("--step", type=click.IntRange(min=1), help="Of which step; by default the newest.")
@click.option("--best", type=COUNT, default=3, show_default=True, help="So many of the best.")
@click.option("--worst", type=COUNT, default=3, show_default=True, help="So many of the worst.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def rollouts(
    out: Path, adapter: str | None, step: int | None, best: int, worst: int, as_json: bool
) -> None:
    """Print the best and the worst samples of a step of reinforcement learning.

    OUT is the run's folder. Samples are those that the step was trained on, by their reward.
    """
    from manylora.runs.rl.kept_rollouts import groups_of
    from manylora.runs.rl.token_texts import texts_of
    from manylora.runs.run_folder import RunPaths

    paths = RunPaths(out)
    name, steps = _chosen_adapter(paths, adapter)
    chosen = _chosen_step(name, steps, step)
    groups = groups_of(paths.adapter(name).rollouts, chosen)
    told = {"adapter": name, "step": chosen, **report_of(groups, best, worst, texts_of(paths))}
    if as_json:
        # Of ASCII alone: what was sampled must not steer a terminal here, either.
        click.echo(json.dumps(told, indent=2))
    else:
        click.echo("\n".join(report_lines(told)))


def report_of(
    groups: Sequence["Group"], best: int, worst: int, texts: "TokenTexts"
) -> dict[str, Any]:
    """Return what is told of a step: its figures, the best and the worst samples, the errors."""
    from manylora.runs.rl.kept_rollouts import is_silent, ranked, samples_of

    samples = ranked(samples_of(groups))
    rewards = [sample.reward for sample in samples]
    # With few samples none is told twice.
    most = min(best, len(samples))
    last = samples[max(most, len(samples) - worst) :]
    return {
        "groups": len(groups),
        "zero_variance_groups": sum(is_silent(group) for group in groups),
        "samples": len(samples),
        "reward": sum(rewards) / len(rewards) if rewards else None,
        "reward_min": rewards[-1] if rewards else None,
        "reward_max": rewards[0] if rewards else None,
        "best": [told_sample(sample, texts) for sample in samples[:most]],
        "worst": [told_sample(sample, texts) for sample in reversed(last)],
        "errors": [
            {"group": group["group"], "row": group["row"], "error": error}
            for group in groups
            for error in group["errors"]
        ],
    }


def told_sample(sample: "KeptSample", texts: "TokenTexts") -> dict[str, Any]:
    """Return a sample as a person and a machine read it."""
    rollout, (oldest, newest) = sample.rollout, sample.versions
    return {
        "row": sample.group["row"],
        "group": sample.group["group"],
        "sample": sample.number,
        "reward": sample.reward,
        "parts": rollout["parts"],
        "advantage": sample.advantage,
        "length": sample.num_sampled,
        "stop_reason": rollout["stop_reason"],
        "version": newest,
        "oldest_version": oldest,
        "turns": rollout["turns"],
        "metrics": rollout["metrics"],
        "seconds": rollout["seconds"],
        "prompt": sample.prompt(texts),
        "answer": rollout["text"],
        "spans": [
            {"sampled": drawn, "text": texts.whole(segment["tokens"][start:stop])}
            for segment, drawn, start, stop in sample.spans()
        ],
    }


def _chosen_adapter(paths: "RunPaths", given: str | None) -> tuple[str, list[int]]:
    """Return an adapter's name, and the steps that it has rollouts of. Raises ConfigError."""
    from manylora.runs.rl.kept_rollouts import kept_steps
    from manylora.types import ConfigError

    if not paths.root.is_dir():
        raise ConfigError(f"{paths.root}: there is no such folder; name the `out` of a run file")
    if given is not None:
        steps = kept_steps(paths.adapter(given).rollouts)
        if steps:
            return given, steps
    folders = sorted(path for path in paths.root.iterdir() if path.is_dir())
    found = {path.name: kept_steps(paths.adapter(path.name).rollouts) for path in folders}
    found = {name: steps for name, steps in found.items() if steps}
    if given is None and len(found) == 1:
        return next(iter(found.items()))
    if not found:
        raise ConfigError(
            f"{paths.root}: no adapter here has rollouts; they are written by entries with `rl`, "
            "once a step is done"
        )
    names = _some(list(found))
    if given is None:
        raise ConfigError(f"{paths.root}: name one with --adapter; with rollouts there are {names}")
    raise ConfigError(f"{paths.root}: adapter {given!r} has no rollouts here; there are {names}")


def _chosen_step(name: str, steps: Sequence[int], given: int | None) -> int:
    """Return a step of which there are rollouts. Raises ConfigError."""
    from manylora.types import ConfigError

    if given is None:
        return steps[-1]
    if given not in steps:
        raise ConfigError(
            f"adapter {name!r} has no rollouts of step {given:,}; there are those of "
            f"{_ranges(steps)} (see keep_rollouts)"
        )
    return given


def _ranges(steps: Sequence[int]) -> str:
    """Return `1–4, 7, 9–12` of numbers in order."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][-1] + 1:
            runs[-1][1:] = [step]
        else:
            runs.append([step])
    return _some([f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs])


def _some(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


# --- as text ----------------------------------------------------------------------------------


def report_lines(told: Mapping[str, Any]) -> Iterator[str]:
    """Return the lines of a report for people."""
    from manylora.runs.board import printable, short

    yield printable(
        f"{told['adapter']}, step {told['step']:,}: {told['samples']:,} samples, "
        f"groups: {told['groups']:,}; reward {short(told['reward'])} "
        f"({short(told['reward_min'])} to {short(told['reward_max'])}); groups of one reward: "
        f"{told['zero_variance_groups']:,}; errors: {len(told['errors']):,}"
    )
    for which in ("best", "worst"):
        if told[which]:
            yield f"\n{which}"
        for sample in told[which]:
            yield from _sample_lines(sample)
    if told["errors"]:
        yield "\nerrors"
    for one in told["errors"]:
        where = f"  row {one['row']:,}, group {one['group']}: "
        yield where + _indented(printable(one["error"]), 4)


def _sample_lines(sample: Mapping[str, Any]) -> Iterator[str]:
    from manylora.runs.board import printable, short

    version, oldest = sample["version"], sample["oldest_version"]
    advantage = sample["advantage"]
    turns = sample["turns"]
    yield "  " + ", ".join(
        (
            f"reward {short(sample['reward'])}",
            "not trained on" if advantage is None else f"advantage {advantage:+.3g}",
            f"row {sample['row']:,}",
            f"group {sample['group']}",
            f"sample {sample['sample']}",
            f"version {version}" if version == oldest else f"versions {oldest} to {version}",
            f"{sample['length']:,} tokens",
            f"{turns:,} turn{'s' * (turns != 1)}",
            f"ended by {_in_line(sample['stop_reason'])}",
        )
    )
    for title, values in (("parts", sample["parts"]), ("metrics", sample["metrics"])):
        if values:
            told = (f"{name} {short(value)}" for name, value in values.items())
            yield f"    {title:<7} {_in_line(', '.join(told))}"
    yield f"    {'prompt':<7} {_indented(printable(sample['prompt']), 12)}"
    if len(sample["spans"]) == 1:
        yield f"    {'answer':<7} {_indented(printable(sample['answer']), 12)}"
        return
    for span in sample["spans"]:
        title = "sampled" if span["sampled"] else "given"
        yield f"    {title:<7} {_indented(printable(span['text']), 12)}"


def _in_line(text: str) -> str:
    """Return a name as a part of a line: nobody's text may begin one that looks like ours."""
    from manylora.runs.board import printable

    return printable(text.replace("\n", " "))


def _indented(text: str, width: int) -> str:
    return text.replace("\n", "\n" + " " * width)
