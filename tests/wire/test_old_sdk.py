"""The oldest supported SDK gets from the server what the newest gets."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker

from manylora.types import AdamParams, Datum
from tests.wire.data import outputs, prompt_scores, random_data, sampled_near, sdk_adam, to_sdk
from tests.wire.oracle import Oracle
from tests.wire.server import BASE_ALIAS, DEVELOPER, Server

OLD = "0.25.0"
SCRIPT = Path(__file__).with_name("sdk025_script.py")
STEP = AdamParams(lr=2e-3, beta2=0.95, eps=1e-8, weight_decay=0.01, clip_norm=1.0)
LOSSES: list[tuple[str, dict[str, float]]] = [
    ("cross_entropy", {}),
    ("ppo", {"clip_low_threshold": 0.7}),
    ("dro", {"beta": 0.05}),
]


def batches() -> list[list[Datum]]:
    made = []
    for number, (loss, _) in enumerate(LOSSES):
        data = random_data(700 + number, 3, loss)
        near = sampled_near(data, Oracle(4, 1).logprobs(data), number)
        made.append(data if loss == "cross_entropy" else near)
    return made


def rows(data: list[Datum]) -> list[dict[str, Any]]:
    return [
        {
            "tokens": datum.tokens.tolist(),
            "inputs": {name: value.tolist() for name, value in datum.loss_inputs.items()},
        }
        for datum in data
    ]


def run_old_sdk(server: Server, work: dict[str, Any]) -> dict[str, Any]:
    folder = Path(sys.prefix) / f"sdk-{OLD}"
    assert folder.is_dir(), f"{folder} is missing; `make test` installs it"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), server.url, DEVELOPER, BASE_ALIAS],
        input=json.dumps(work),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(folder), "TINKER_TELEMETRY": "0"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_oldest_sdk_gets_the_same_numbers(service: tinker.ServiceClient, server: Server):
    probe, prompt = random_data(99, 3), random_data(7, 1)[0].tokens.tolist()
    old = run_old_sdk(
        server,
        {
            "probe": rows(probe),
            "prompt": prompt,
            "steps": [
                {
                    "data": rows(data),
                    "loss": loss,
                    "config": config,
                    "adam": sdk_adam(STEP).model_dump(),
                }
                for data, (loss, config) in zip(batches(), LOSSES, strict=True)
            ],
        },
    )
    assert old["version"] == OLD
    client = service.create_lora_training_client(BASE_ALIAS, rank=4, seed=1).result()
    for number, (data, (loss, config)) in enumerate(zip(batches(), LOSSES, strict=True)):
        result = client.forward_backward(to_sdk(data), loss, config or None).result()  # type: ignore[arg-type]
        client.optim_step(sdk_adam(STEP)).result()
        assert old["outputs"][number] == [one.tolist() for one in outputs(result)]
        assert old["metrics"][number] == result.metrics
    trained = client.forward(to_sdk(probe), "cross_entropy").result()
    for name in ("trained", "loaded", "resumed"):
        assert old[name] == [one.tolist() for one in outputs(trained)], name
    sampler = client.save_weights_and_get_sampling_client().result()
    scores = [None, *prompt_scores(sampler, prompt).tolist()]
    assert old["scores"] == scores
    assert old["named"] == pytest.approx(scores, abs=1e-6)
    answer = sampler.sample(
        tinker.ModelInput.from_ints(prompt),
        2,
        tinker.SamplingParams(max_tokens=6, seed=3, stop=[]),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=3,
    ).result()
    given = [[s.tokens, s.logprobs, s.stop_reason] for s in answer.sequences]
    assert old["samples"] == given
    topk = answer.topk_prompt_logprobs
    assert topk is not None
    assert old["topk"] == [row if row is None else [list(pair) for pair in row] for row in topk]
    assert old["checkpoints"] == ["sampler_weights/old", "weights/old"]
    archive = httpx.get(old["archive"], trust_env=False).content
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        assert "adapter_model.safetensors" in tar.getnames()
