"""Each kind of run stands under the key that tells it in an adapter's entry.

This is the one place that knows them all. A new kind is a model of its settings with a key in
`config/run_file.py::AdapterEntry`, a course, and a line in `KINDS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from manylora.config import AdapterEntry
from manylora.runs.columns import CourseColumns
from manylora.runs.course import Course, CoursePlan, Job, Progress
from manylora.runs.encode import Between, nothing
from manylora.runs.rl.rl_data import check_rl, columns_of, prepare_rl
from manylora.runs.rl.rl_plan import plan_rl
from manylora.runs.sft import SFT_COLUMNS
from manylora.runs.sft_data import Read, prepare_sft
from manylora.runs.sft_plan import plan_sft

# Reads the data of an entry and makes its course; see `plan_job` for the arguments.
Prepare = Callable[[AdapterEntry, Any, Progress, Read | None, Between], Course]
# Finds what an entry's course would do from a base's tokenizer and vocabulary, without its weights.
PlanCourse = Callable[[AdapterEntry, Any, Any], CoursePlan]


@dataclass(frozen=True, slots=True)
class Kind:
    """A `Kind` is one kind of run: the figures of its steps, its course, and the plan of that.

    Attributes:
        check: refuses, before the base is opened, what of an entry can be seen to be wrong.
    """

    columns: Callable[[AdapterEntry], CourseColumns]
    prepare: Prepare
    plan: PlanCourse
    check: Callable[[AdapterEntry], None] = lambda entry: None


KINDS: Mapping[str, Kind] = {
    "sft": Kind(lambda entry: SFT_COLUMNS, prepare_sft, plan_sft),
    "rl": Kind(columns_of, prepare_rl, plan_rl, check_rl),
}


def kind_of(entry: AdapterEntry) -> Kind:
    """Return how an entry is trained."""
    return KINDS[entry.kind]


def plan_job(
    entry: AdapterEntry,
    *,
    name: str | None = None,
    read: Read | None = None,
    between: Between = nothing,
    keep: int | None = None,
) -> Job:
    """Return the job of one adapter; its data are read later, by `prepare`.

    Args:
        name: the adapter's name with the client; by default the entry's.
        read: where its data come from, if not from what the entry names.
        between: called every few examples while they are tokenised.
        keep: how many of the newest training states stay, if the entry does not say; None = all.
    """
    kind = kind_of(entry)

    def prepare(client: Any, progress: Progress) -> Course:
        return kind.prepare(entry, client, progress, read, between)

    return Job(
        name=entry.name if name is None else name,
        spec=entry.spec(),
        columns=kind.columns(entry),
        prepare=prepare,
        steps=entry.kind_settings.known_steps,
        save_every=entry.save_every,
        keep=keep if entry.checkpoints is None else entry.checkpoints.keep,
        init_from=entry.lora.init_from,
    )
