"""The page: complete, self-contained, and not to be broken by what is in a run."""

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from manylora.config import RunFile
from manylora.runs.report import report_data, script_json, thinned, write_report
from manylora.runs.run_folder import RunPaths, read_json, write_json
from manylora.runs.sft import SFT_COLUMNS
from tests.unit.runs.driving.conftest import metrics, summary, train

HOSTILE = "</script><script>alert(1)</script><!-- <script> & \u2028 ${x} `"


class Page(HTMLParser):
    """Collects what a browser would load, and the content of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.scripts: list[dict[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.loaded += [found[name] for name in ("src", "href", "data") if name in found]
        if tag == "script":
            self.scripts.append({**found, "text": ""})

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1]["text"] += data


def page_of(run: RunFile) -> Page:
    return Page(RunPaths(run.out).report.read_text(encoding="utf-8"))


def data_of(page: Page) -> dict[str, Any]:
    return json.loads(page.scripts[0]["text"])


def test_the_page_holds_the_run_and_loads_nothing(run_file: RunFile):
    assert train(run_file) == 0
    page = page_of(run_file)
    assert page.loaded == ["data:,"]
    text = RunPaths(run_file.out).report.read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\((?!#)|innerHTML|insertAdjacentHTML|document\.write", text)
    data = data_of(page)
    assert data["summary"] == summary(run_file)
    assert data["series"]["beta"]["loss"] == [row["loss"] for row in metrics(run_file, "beta")]
    assert data["samples"]["alpha"][0]["after"] is not None
    assert "max_steps: 6" in data["run_yaml"]


def test_hostile_text_stays_text(run_file: RunFile):
    assert train(run_file) == 0
    paths = RunPaths(run_file.out)
    answer = {"prompt": HOSTILE, "expected": HOSTILE, "answer": HOSTILE, "exact": True}
    write_json(paths.adapter("alpha").samples, {"before": [answer], "after": [answer]})
    paths.run_yaml.write_text(HOSTILE)
    write_report(paths, {entry.name: SFT_COLUMNS for entry in run_file.adapters})
    page = page_of(run_file)
    assert len(page.scripts) == 2  # the data and the program; none of the sample's
    data = data_of(page)
    assert data["samples"]["alpha"][0]["after"]["text"] == HOSTILE
    assert data["run_yaml"] == HOSTILE


@pytest.mark.parametrize("character", ["<", ">", "&", "\u2028", "\u2029"])
def test_script_json_has_no_character_that_means_something_to_html(character: str):
    assert character not in script_json({character: character})
    assert json.loads(script_json({character: character})) == {character: character}


def test_long_curves_keep_their_extremes():
    rows = [{"step": i, "loss": 1.0 + (i % 7)} for i in range(1, 10_001)]
    rows[4321]["loss"], rows[1234]["loss"] = 99.0, -5.0
    rows[77]["loss"] = None  # type: ignore[assignment]
    kept = thinned(rows, "loss", 500)
    assert len(kept) <= 502
    assert kept[0] is rows[0] and kept[-1] is rows[-1]
    assert rows[4321] in kept and rows[1234] in kept
    assert [row["step"] for row in kept] == sorted(row["step"] for row in kept)
    assert thinned(rows[:500], "loss", 500) == rows[:500]


def test_a_run_that_has_hardly_begun_has_a_page_too(run_file: RunFile):
    paths = RunPaths(run_file.out)
    write_report(paths, {})
    assert report_data(paths, {})["summary"]["adapters"] == {}
    assert read_json(paths.summary) is None


def test_the_run_file_can_ask_for_no_page(run_data: dict[str, Any]):
    run = RunFile.model_validate({**run_data, "report": False})
    assert train(run) == 0
    assert not RunPaths(run.out).report.exists()
