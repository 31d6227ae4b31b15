"""Adapters of several owners on one host, more of them than fit."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import manylora.api.client as client_module
from manylora.api import AdapterClient, AdapterHandle, Trainer
from manylora.checkpoint import load_state, save_state
from manylora.engine import Engine
from manylora.hosting import Host
from manylora.types import Datum, Opening, SamplingParams, SaveFailed
from tests.laws.tenants import random_data
from tests.models import TinyBases

pytestmark = pytest.mark.usefixtures("threads")
NAMES = ("a", "b", "c")


def batch(seed: int) -> list[Datum]:
    return random_data(np.random.default_rng(seed), 2)


def learn(handles: list[AdapterHandle], rounds: int = 4) -> list[list[float]]:
    """Round by round, so that each adapter leaves and comes back."""
    losses = []
    for number in range(rounds):
        works = [handle.forward_backward(batch(number)) for handle in handles]
        steps = [handle.optim_step(lr=1e-2, clip_norm=1.0) for handle in handles]
        losses.append([work.result().loss for work in works])
        assert [step.result().step for step in steps] == [number + 1] * len(handles)
    return losses


def test_operations_without_numbers_are_paged_like_others(tiny: TinyBases, tmp_path: Path) -> None:
    engine = Engine(Opening(str(tiny("llama")), token_budget=64))
    host = Host([engine], tmp_path / "data", token_budget=64, max_resident=1)
    # Held states go to disk at once: whatever comes back has been through a file.
    pager = host.units[0].pager
    pager.host_bytes = pager._held.max_bytes = 1
    clients = [AdapterClient(host, tenant=f"tenant-{name}") for name in NAMES]
    handles = [
        client.create(name, rank=2 + n, seed=n)
        for n, (client, name) in enumerate(zip(clients, NAMES, strict=True))
    ]
    losses = learn(handles)
    assert host.counts()["disk"] >= 1
    for name, handle in zip(NAMES, handles, strict=True):
        handle.save(tmp_path / name).result()
    host.close(cancel=False)
    with Trainer(tiny("llama"), token_budget=64) as trainer:
        alone = [trainer.create(name, rank=2 + n, seed=n) for n, name in enumerate(NAMES)]
        assert learn(alone) == losses
        for name, handle in zip(NAMES, alone, strict=True):
            handle.save(tmp_path / f"{name}-alone").result()
    for name in NAMES:
        one, other = (load_state(tmp_path / f) for f in (name, f"{name}-alone"))
        assert np.array_equal(one.state.weights, other.state.weights)
        assert one.state.step == 4


def test_training_does_not_wait_for_a_save_and_the_save_is_of_its_place(
    tiny: TinyBases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = threading.Event()

    def slow_save(*arguments: Any, **named: Any) -> None:
        assert write.wait(60)
        save_state(*arguments, **named)

    monkeypatch.setattr(client_module, "save_state", slow_save)
    with Trainer(tiny("llama"), token_budget=64) as trainer:
        handle = trainer.create("a", rank=2)
        learn([handle], 2)
        saved = handle.save(tmp_path / "two")
        handle.forward_backward(batch(9))
        assert handle.optim_step(lr=0.1).result().step == 3
        handle.unload().result()
        assert not saved.done()
        write.set()
        assert load_state(saved.result()).state.step == 2
        assert trainer.sample([[5]], SamplingParams(max_tokens=2, stop=())).result()


def test_a_save_that_fails_is_its_futures_error(tiny: TinyBases, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with Trainer(tiny("llama"), token_budget=64) as trainer:
        handle = trainer.create("a", rank=2)
        assert isinstance(handle.save(tmp_path / "file" / "x").exception(), SaveFailed)
        assert learn([handle], 1)
