"""The figures of a kind of run have names, forms for people, and a place in its summary.

A course declares its figures once. Events, metrics.jsonl, result.json, the live table, trackers and
the report take them from the declaration and know none by name, except `tokens`, which every course
counts and of which all rates are.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Column:
    """A `Column` is one figure of every step, or of every evaluation.

    Attributes:
        name: its key in metrics.jsonl, events and result.json.
        label: what people read; "" = tables do not show it.
        unit: a number, or a share between 0 and 1, which people read in percent.
        better: which of two values is the better one; "" = neither.
        total: what the summary says of all steps: their sum, or as `first_NAME` and `last_NAME`
            both ends of the curve; "" = nothing.
        tracked: whether trackers show it.
        charted: whether the report draws it.
        watched: what people see of it while the run goes on: its "last" value, or the "mean" of
            the last steps; "" = nothing. The curve is seen at any rate.
        checked: whether a step fails where it is a number that is not finite.
        counted_by: the figure that says how many cases it is about; "" = none.
    """

    name: str
    label: str = ""
    unit: Literal["number", "share"] = "number"
    better: Literal["lower", "higher", ""] = ""
    total: Literal["ends", "sum", ""] = ""
    tracked: bool = True
    charted: bool = False
    watched: Literal["last", "mean", ""] = ""
    checked: bool = False
    counted_by: str = ""

    def badness(self, value: float | None) -> float:
        """Return a number that is the smaller, the better the value is; infinite without one."""
        if value is None:
            return math.inf
        return -value if self.better == "higher" else value


@dataclass(frozen=True, slots=True)
class CourseColumns:
    """`CourseColumns` are all figures of a kind of run. One that a step does not have is None.

    Attributes:
        step: figures of a step, in the order of metrics.jsonl; one of them is `tokens`, the
            positions that the model read. The first one of which one value is better than another
            is the curve by which people follow the run.
        evaluation: figures of an evaluation; those of which one value is better than another say
            which training state is the best, the first of them before the second.
    """

    step: tuple[Column, ...]
    evaluation: tuple[Column, ...] = ()

    @property
    def curve(self) -> Column:
        """People follow a run by this figure."""
        return next(column for column in self.step if column.better)

    def watched(self) -> Iterator[Column]:
        """Return the figures that people see while the run goes on, besides the curve."""
        return (column for column in self.step if column.watched and column != self.curve)

    def ends(self) -> Iterator[Column]:
        """Return the figures of which a summary has the first and the last value."""
        return (column for column in self.step if column.total == "ends")

    def sums(self) -> Iterator[Column]:
        """Return the figures of which a summary has the sum."""
        return (column for column in self.step if column.total == "sum")

    def badness(self, evaluation: Mapping[str, Any]) -> tuple[float, ...]:
        """Return a key that is the smaller, the better an evaluation went."""
        judged = (column for column in self.evaluation if column.better)
        return tuple(column.badness(evaluation.get(column.name)) for column in judged)

    def not_finite(self, figures: Mapping[str, Any]) -> str:
        """Return as text a step's checked figures where one is not finite; "" where all are.

        A figure that the step does not have, None, is no fault.
        """
        found = {column.label: figures[column.name] for column in self.step if column.checked}
        checked = {label: value for label, value in found.items() if value is not None}
        if all(map(math.isfinite, checked.values())):
            return ""
        return ", ".join(f"{label} {value}" for label, value in checked.items())
