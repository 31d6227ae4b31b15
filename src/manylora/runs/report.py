"""report.html is one page about a run that opens anywhere, without a network.

The page is a template with the run's files in it as JSON. All text reaches the document through
`textContent`, so a sample may hold any HTML; the JSON itself cannot end its script element,
because `<` is written as an escape.
"""

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import zip_longest
from typing import Any

from manylora.runs.columns import CourseColumns
from manylora.runs.metrics_file import read_metrics
from manylora.runs.run_folder import RunPaths, read_json, write_text

# More points than a screen has columns are not seen; each bucket keeps its extremes instead.
MAX_POINTS = 1500
MAX_TEXT = 4000
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
    return {
        "title": paths.root.resolve().name,
        "summary": summary,
        "run_yaml": paths.run_yaml.read_text(encoding="utf-8") if paths.run_yaml.exists() else "",
        "series": {name: _series(paths, name, columns[name]) for name in summary["adapters"]},
        "samples": {name: _samples(paths, name) for name in summary["adapters"]},
    }


def _series(paths: RunPaths, name: str, columns: CourseColumns) -> dict[str, list[Any]]:
    rows = thinned(read_metrics(paths.adapter(name).metrics), columns.curve.name)
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
        return sample and {"text": _cut(sample["answer"]), "exact": sample["exact"]}

    return {
        "prompt": _cut(either.get("prompt", "")),
        "expected": _cut(either["expected"]) if either.get("expected") is not None else None,
        "before": side(before),
        "after": side(after),
    }


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} …"
