"""Runs are submitted to a server, and their progress is told in the words of `train`."""

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import click

from manylora.cli.server_client import Client, Refused, ServerUnreachable
from manylora.config import AdapterEntry, RunFile, is_data_file
from manylora.runs.columns import CourseColumns
from manylora.runs.data_rows import row_of
from manylora.runs.events import (
    AdapterEnded,
    AdapterStarted,
    EvalDone,
    Listener,
    Phase,
    RunEnded,
    RunStarted,
    Status,
    StepDone,
)
from manylora.runs.kinds import kind_of
from manylora.runs.outcome import error_dict, exit_code
from manylora.runs.sources import read_source
from manylora.runs.view import open_view
from manylora.types import DataError

POLL_SECONDS = 1.0
# A server that is started again takes its time; runs survive it.
PATIENCE_SECONDS = 600.0


@dataclass(slots=True)
class Followed:
    """A `Followed` is a run on the server; `info` is its last answer."""

    name: str
    id: str = ""
    info: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    told: set[str] = field(default_factory=set)

    @property
    def ended(self) -> bool:
        return self.info.get("status") in get_args(Status)


class Following:
    """A `Following` submits and follows the adapters of one run file on a server."""

    def __init__(self, client: Client, run: RunFile, folder: Path, *, as_json: bool):
        """Keep what to submit; data are called by their paths from `folder`, the run file's."""
        self._client, self._run, self._folder = client, run, folder
        self._as_json = as_json
        self._followed: list[Followed] = []
        self._columns = {entry.name: kind_of(entry).columns for entry in run.adapters}
        self._waiting = False

    def go(self, entries: Sequence[AdapterEntry]) -> int:
        """Submit, follow to the end, and tell; return the exit code. Raises Refused or
        ServerUnreachable if nothing could be submitted, or not be followed."""
        with open_view("json" if self._as_json else "auto") as view:
            steps = {entry.name: entry.kind_settings.known_steps for entry in entries}
            view(RunStarted(self._client.url, self._run.base, steps, self._columns))
            for entry in entries:
                self._followed.append(self._submit(entry, view))
            self._follow(view)
            code = exit_code([run.info["status"] for run in self._followed])
            if self._as_json:
                view(RunEnded(self._client.url, code, self._summary()))
        if not self._as_json:
            for run in self._followed:
                click.echo(_closing(run, self._columns[run.name]))
        return code

    def unfinished(self) -> Iterator[tuple[str, str]]:
        """Return the names and ids of the runs that go on without us."""
        return ((run.name, run.id) for run in self._followed if run.id and not run.ended)

    # -- inside ---------------------------------------------------

    def _submit(self, entry: AdapterEntry, view: Listener) -> Followed:
        """Submit one adapter; what is wrong with it concerns no other."""
        run = Followed(entry.name)
        try:
            run.info = self._client.call("POST", "runs", self._request(entry))
            run.id = run.info["id"]
        except (Refused, DataError) as error:
            if isinstance(error, Refused) and error.status in (401, 404):
                raise  # a wrong key, or no such server
            run.info = {"status": "failed", "error": error_dict(error)}
            self._tell(run, view)
        return run

    def _request(self, entry: AdapterEntry) -> dict[str, Any]:
        adapter = entry.model_dump(mode="json")
        data: dict[str, str] = {}
        for which, source in entry.kind_settings.sources().items():
            data[which] = _lines(source)
            if is_data_file(source):
                adapter[entry.kind][which] = os.path.relpath(source, self._folder)
        return {"adapter": adapter, "data": data, "base_model": self._run.base}

    def _follow(self, view: Listener) -> None:
        heard = time.monotonic()
        while going := [run for run in self._followed if not run.ended]:
            for run in going:
                try:
                    run.info = self._client.get(f"runs/{run.id}?after={run.step}")
                except ServerUnreachable as error:
                    if time.monotonic() - heard > PATIENCE_SECONDS:
                        raise
                    self._waits(f"waiting: {error}", view)
                    break
                heard = time.monotonic()
                self._waits("", view)
                self._tell(run, view)
            if any(not run.ended for run in going):
                time.sleep(POLL_SECONDS)

    def _waits(self, text: str, view: Listener) -> None:
        if bool(text) != self._waiting:
            self._waiting = bool(text)
            view(Phase("", text))

    def _tell(self, run: Followed, view: Listener) -> None:
        """Tell what is new since the last answer, as events."""
        info, name = run.info, run.name
        if info.get("num_params") and _once(run, "started"):
            params, steps = info["num_params"], info["steps"]
            view(AdapterStarted(name, info["resumed_from"], steps, params))
        self._tell_eval(run, "before", view)
        for row in info.get("metrics") or ():
            run.step = row["step"]
            view(StepDone.of_row(name, info["steps"], row))
        self._tell_eval(run, "after", view)
        if run.ended and _once(run, "ended"):
            error = info.get("error")
            text = f"{error['type']}: {error['message']}" if error else ""
            view(AdapterEnded(name, info["status"], info.get("step", 0), text))

    def _tell_eval(self, run: Followed, when: str, view: Listener) -> None:
        figures = run.info.get(f"eval_{when}")
        if figures is not None and _once(run, when):
            step = 0 if when == "before" else run.info["step"]
            columns = self._columns[run.name].evaluation
            told = {column.name: figures.get(column.name) for column in columns}
            view(EvalDone(run.name, when, step, told))

    def _summary(self) -> dict[str, Any]:
        kept = {r.name: {k: v for k, v in r.info.items() if k != "metrics"} for r in self._followed}
        return {"base": self._run.base, "url": self._client.url, "adapters": kept}


def _once(run: Followed, what: str) -> bool:
    new = what not in run.told
    run.told.add(what)
    return new


def _closing(run: Followed, columns: CourseColumns) -> str:
    info = run.info
    words = [run.name, str(info["status"])]
    first, last = (info.get(f"{end}_{columns.curve.name}") for end in ("first", "last"))
    if last is not None:
        words.append(f"step {info['step']:,}/{info['steps']:,}")
        words.append(f"{columns.curve.label} {first:.3g} → {last:.3g}")
    if info.get("error"):
        words.append(f"{info['error']['type']}: {info['error']['message']}")
    return "  ".join([*words, *([info["path"]] if info.get("path") else [])])


def _lines(source: str) -> str:
    """Return a data source as JSON Lines; such a file as it is, so that its line numbers stay."""
    if source.lower().endswith(".jsonl"):
        try:
            return Path(source).read_bytes().decode("utf-8")
        except OSError as error:
            raise DataError(f"{source}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{source}: is not UTF-8 text (byte {error.start + 1})") from error
    read = read_source(source)
    rows = (row_of(read.kind, example) for example in read.examples)
    return "".join(f"{json.dumps(row)}\n" for row in rows)
