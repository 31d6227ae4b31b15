"""The doctor reports what it meets, bad news included."""

import json

import pytest

from manylora.cli import doctor
from manylora.cli import main as cli


@pytest.fixture
def quick(monkeypatch):
    """Without opening a model."""
    seedling = doctor.Finding("ok", "seedling", "opens")
    monkeypatch.setattr(doctor, "_seedling", lambda: iter([seedling]))


@pytest.mark.usefixtures("quick")
def test_a_healthy_machine(capsys):
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.split()[0] in ("ok", "warn") for line in lines)
    names = [line.split()[1] for line in lines]
    assert {"python", "cores", "memory", "disk", "torch", "threads", "seedling"} <= set(names)


@pytest.mark.usefixtures("quick")
def test_json(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert {frozenset(finding) for finding in findings} == {frozenset({"state", "name", "text"})}


@pytest.mark.usefixtures("quick")
def test_a_missing_package_fails(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "NEEDED", ("torch", "no-such-package"))
    assert cli.main(["doctor"]) == 1
    assert "fail  no-such-package" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_a_check_that_breaks_is_a_finding(monkeypatch, capsys):
    def broken():
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(doctor, "_disk", broken)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "fail  disk" in out and "RuntimeError: the disk is on fire" in out
    assert "seedling" in out  # the others go on


def test_little_room_and_too_many_threads_are_warned_of(monkeypatch):
    usage = type("Usage", (), {"free": 2**20, "total": 2**40})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    assert [finding.state for finding in doctor._disk()] == ["warn"]
    monkeypatch.setattr(doctor, "usable_cores", lambda: 0)
    assert next(iter(doctor._torch())).state == "warn"


def test_a_seedling_without_files_is_warned_of(monkeypatch, tmp_path):
    monkeypatch.setattr("manylora.models.resolve_base", lambda _: str(tmp_path))
    (finding,) = doctor._seedling()
    assert finding.state == "warn" and str(tmp_path) in finding.text
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("manylora.models.loading.resolve_base", lambda _: str(tmp_path))
    (finding,) = doctor._seedling()
    assert finding.state == "fail"
