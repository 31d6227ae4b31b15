"""report.html is one page about a run that opens anywhere, without a network.

The page is a template with the run's files in it as JSON. All text reaches the document through
`textContent`, so a sample may hold any HTML; the JSON itself cannot end its script element,
because `<` is written as an escape.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from itertools import zip_longest
from typing import Any

from manylora.runs.columns import Column, CourseColumns
from manylora.runs.metrics_file import read_metrics
from manylora.runs.rl.publishes import publishes
from manylora.runs.rl.shown_rollouts import sample_bytes, shown_rollouts, within
from manylora.runs.rl.token_texts import texts_of
from manylora.runs.run_folder import RunPaths, read_json, write_text

# More points than a screen has columns are not seen; each bucket keeps its extremes instead.
MAX_POINTS = 1500
# An adapter that samples has more figures, and its samples need room too.
SAMPLING_POINTS = 1000
MAX_TEXT = 4000
# Of a run with rollouts: bytes of all answers to evaluation prompts, and of one text at least.
MAX_ANSWERS, MIN_ANSWER = 800_000, 200
# The page has a place of its own for these figures of steps; for others it makes one.
_KNOWN = frozenset({"loss", "lr", "grad_norm"})
_PLACE = "{{ DATA }}"


def write_report(paths: RunPaths, columns: Mapping[str, CourseColumns]) -> None:
    """Write the page from what the run left on disk; `columns` are the figures of each adapter."""
    template = resources.files("manylora.runs").joinpath("report_template.html")
    page = template.read_text(encoding="utf-8")
    head, _, tail = page.partition(_PLACE)
    write_text(paths.report, f"{head}{script_json(report_data(paths, columns))}{tail}")


def script_json(value: Any) -> str:
    """Return JSON that is safe inside a script element, whatever its strings hold."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return (
        text.replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("&", "\\u0026")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )


def report_data(paths: RunPaths, columns: Mapping[str, CourseColumns]) -> dict[str, Any]:
    """Return everything that the page shows."""
    summary = read_json(paths.summary) or {"status": "running", "adapters": {}}
    names = list(summary["adapters"])
    sampling = [name for name in names if paths.adapter(name).rollouts.is_dir()]
    most = {name: SAMPLING_POINTS if name in sampling else MAX_POINTS for name in names}
    data: dict[str, Any] = {
        "title": paths.root.resolve().name,
        "summary": summary,
        "run_yaml": paths.run_yaml.read_text(encoding="utf-8") if paths.run_yaml.exists() else "",
        "series": {name: _series(paths, name, columns[name], most[name]) for name in names},
        "samples": {name: _samples(paths, name) for name in names},
    }
    told = [columns[name] for name in names]
    if any(one.name not in _KNOWN for of in told for one in of.step if one.charted):
        data["figures"] = _figures(told)
    if sampling:
        data |= _sampled(paths, sampling)
        for name in sampling:
            data["samples"][name] = _shortened(data["samples"][name], len(sampling))
    return data


def _figures(told: Sequence[CourseColumns]) -> dict[str, Any]:
    """Return what the page must know of the figures of all adapters to draw and name them."""
    return {
        "curves": list(dict.fromkeys(of.curve.name for of in told)),
        "step": _described(one for of in told for one in of.step if one.charted),
        "ends": _described(one for of in told for one in of.ends()),
        "evaluation": _described(one for of in told for one in of.evaluation if one.label),
    }


def _described(columns: Iterable[Column]) -> list[dict[str, Any]]:
    """Return each figure once; of two kinds of run with one name, as it is judged by one."""
    found: dict[str, dict[str, Any]] = {}
    for one in columns:
        entry = {"name": one.name, "label": one.label, "unit": one.unit, "better": one.better}
        if one.better or one.name not in found:
            found[one.name] = entry
    return list(found.values())


def _sampled(paths: RunPaths, names: Sequence[str]) -> dict[str, Any]:
    """Return what was sampled in training, and when what it was sampled from was published."""
    texts, most = texts_of(paths), sample_bytes(len(names))
    timelines = {name: publishes(read_metrics(paths.adapter(name).metrics)) for name in names}
    return {
        "publishes": {name: _lines_up(thinned_steps(of)) for name, of in timelines.items() if of},
        "rollouts": {
            name: shown_rollouts(paths.adapter(name).rollouts, texts, most) for name in names
        },
    }


def thinned_steps(
    steps: Mapping[int, dict[str, Any]], most: int = SAMPLING_POINTS
) -> list[dict[str, Any]]:
    """Return at most about `most` of the steps, evenly spread, the last one among them."""
    every = -(-len(steps) // most) or 1
    found = list(steps.values())
    return [*found[:-1:every], *found[-1:]]


def _lines_up(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _series(paths: RunPaths, name: str, columns: CourseColumns, most: int) -> dict[str, list[Any]]:
    rows = thinned(read_metrics(paths.adapter(name).metrics), columns.curve.name, most)
    charted = ("step", *(column.name for column in columns.step if column.charted))
    return {column: [row.get(column) for row in rows] for column in charted}


def thinned(
    rows: Sequence[dict[str, Any]], curve: str, most: int = MAX_POINTS
) -> list[dict[str, Any]]:
    """Return at most about `most` rows; every bucket keeps the curve's lowest and highest value."""
    if len(rows) <= most:
        return list(rows)

    def value(row: dict[str, Any]) -> float:
        return float(row[curve])

    size = -(-2 * len(rows) // most)
    kept: dict[int, dict[str, Any]] = {}
    for start in range(0, len(rows), size):
        bucket = [row for row in rows[start : start + size] if row.get(curve) is not None]
        for row in (min(bucket, key=value), max(bucket, key=value)) if bucket else ():
            kept[row["step"]] = row
    # Where the curve begins and ends is what the table says too.
    for row in (rows[0], rows[-1]):
        kept[row["step"]] = row
    return [kept[step] for step in sorted(kept)]


def _samples(paths: RunPaths, name: str) -> list[dict[str, Any]]:
    """Return samples before and after, side by side; the prompts are the same in both."""
    found = read_json(paths.adapter(name).samples)
    found = found if isinstance(found, dict) else {}
    before, after = found.get("before") or [], found.get("after") or []
    return [_pair(*sides) for sides in zip_longest(before, after)]


def _pair(before: dict[str, Any] | None, after: dict[str, Any] | None) -> dict[str, Any]:
    either = after or before or {}

    def side(sample: dict[str, Any] | None) -> dict[str, Any] | None:
        if sample is None:
            return None
        reward = {"reward": sample["reward"]} if "reward" in sample else {}
        return {"text": _cut(sample["answer"]), "exact": sample["exact"], **reward}

    return {
        "prompt": _cut(either.get("prompt", "")),
        "expected": _cut(either["expected"]) if either.get("expected") is not None else None,
        "before": side(before),
        "after": side(after),
    }


def _shortened(pairs: list[dict[str, Any]], adapters: int) -> list[dict[str, Any]]:
    """Return samples whose texts leave room for what else is shown of so many adapters."""
    most = max(MIN_ANSWER, MAX_ANSWERS // max(1, 3 * adapters * len(pairs)))

    def short(value: Any) -> Any:
        if isinstance(value, str):
            return within(value, most)
        return {**value, "text": within(value["text"], most)} if value else value

    return [{key: short(value) for key, value in pair.items()} for pair in pairs]


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} …"
