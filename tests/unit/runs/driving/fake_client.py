"""A client without an engine: small numbers that depend on every operation and on its order.

Each adapter is a vector of eight float64; a gradient is a function of the tokens, of the weights
and of the vector, so a lost, repeated or reordered operation changes all that follows.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from manylora.lora.sites import Site
from manylora.models.vocabulary import Vocabulary
from manylora.types import (
    AdamParams,
    AdapterSpec,
    CheckpointMismatch,
    Datum,
    DeviceTime,
    ForwardBackwardResult,
    NotFinite,
    OptimStepResult,
    SampledSequence,
    SampleResult,
    SamplingParams,
    SaveFailed,
    StepRefused,
)

SIZE = 8


class FakeTokenizer:
    """One token per character, and 0 for the end."""

    eos_token_id: int | None = 0
    bos_token_id: int | None = None
    chat_template: str | None = None

    def __call__(self, texts: Any, **_: Any) -> dict[str, Any]:
        if isinstance(texts, str):
            return {"input_ids": [ord(c) for c in texts]}
        return {"input_ids": [[ord(c) for c in text] for text in texts]}

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(t) for t in tokens if t)


class FakeAdapter:
    """Strictly ordered operations on one worker thread shared by all adapters."""

    def __init__(self, client: "FakeClient", name: str, spec: AdapterSpec) -> None:
        self.client, self.name, self.spec = client, name, spec
        self.num_params = SIZE
        self.weights = np.full(SIZE, 1.0 + spec.seed)
        self.moments = np.zeros(SIZE)
        self.grad: np.ndarray | None = None
        self.step = 0
        self.refuse = False
        self.unloaded = False

    def _submit(self, what: str, work: Any) -> "Future[Any]":
        self.client.submitted.append((self.name, what))
        return self.client.worker.submit(work)

    def forward(
        self,
        data: Sequence[Datum],
        loss: str = "cross_entropy",
        config: Any = None,
        *,
        logprobs: str = "all",
    ):
        self.client.wanted.add(("forward", logprobs))
        return self._submit("forward", lambda: self._loss(data)[0])

    def forward_backward(
        self,
        data: Sequence[Datum],
        loss: str = "cross_entropy",
        config: Any = None,
        *,
        logprobs: str = "all",
    ):
        self.client.wanted.add(("forward_backward", logprobs))

        def work() -> ForwardBackwardResult:
            time.sleep(self.client.step_seconds)
            try:
                result, grad = self._loss(data)
                if not math.isfinite(result.loss):
                    raise NotFinite("loss is nan")
            except Exception:
                self.refuse = True
                raise
            self.grad = grad if self.grad is None else self.grad + grad
            return result

        return self._submit("forward_backward", work)

    def _loss(self, data: Sequence[Datum]) -> tuple[ForwardBackwardResult, np.ndarray]:
        total, grad = 0.0, np.zeros(SIZE)
        for datum in data:
            weights = datum.loss_inputs["weights"].astype(np.float64)
            feature = np.sin(np.outer(datum.loss_inputs["target_tokens"], np.arange(1, SIZE + 1)))
            part = weights @ feature
            total += float(part @ self.weights) ** 2 + float(weights.sum())
            grad += part * 0.1 + self.weights * 0.01
        return ForwardBackwardResult((), total, device=DeviceTime(0.2, 0.1)), grad

    def optim_step(self, params: AdamParams):
        def work() -> OptimStepResult:
            if self.refuse or self.grad is None:
                self.refuse = False
                raise StepRefused("its gradients were dropped")
            norm = float(np.linalg.norm(self.grad))
            self.moments = params.beta1 * self.moments + self.grad
            self.weights = self.weights - params.lr * self.moments
            if params.lr > 1e3:
                self.weights = self.weights * np.nan
            self.grad, self.step = None, self.step + 1
            return OptimStepResult(self.step, norm, device=DeviceTime(0.02, 0.01))

        return self._submit("optim_step", work)

    def sample(self, prompts: Sequence[Sequence[int]], params: SamplingParams):
        def work() -> SampleResult:
            letters = tuple(65 + (self.step + i) % 26 for i in range(3))
            sequence = SampledSequence(letters, (0.0,) * 3, "length")
            return SampleResult((sequence,) * len(prompts), device=DeviceTime(0.9, 0.3))

        return self._submit("sample", work)

    def save(self, folder: Path, client: Mapping[str, Any]):
        def work() -> Path:
            if self.name in self.client.full_disk:
                raise SaveFailed(f"{folder}: No space left on device")
            folder.mkdir(parents=True, exist_ok=True)
            state = {
                "weights": self.weights.tolist(),
                "moments": self.moments.tolist(),
                "step": self.step,
                "spec": str(self.spec),
                "client": dict(client),
            }
            (folder / "state.json").write_text(json.dumps(state))
            return folder

        return self._submit("save", work)

    def export(self, folder: Path, merged: bool = False):
        def work() -> Path:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "adapter_model.safetensors").write_bytes(self.weights.tobytes())
            return folder

        return self._submit("export", work)

    def unload(self):
        def work() -> None:
            self.unloaded = True

        return self._submit("unload", work)


class FakeClient:
    """What `Trainer` offers, as far as runs use it."""

    def __init__(self, *, context_length: int = 64, step_seconds: float = 0.0) -> None:
        self.tokenizer = FakeTokenizer()
        self.vocabulary = Vocabulary(None, (0,), "config.json")
        self.base_name, self.fingerprint = "fake", "0"
        self.sites: tuple[Site, ...] = ()
        self.context_length = context_length
        self.step_seconds = step_seconds
        self.full_disk: set[str] = set()
        self.submitted: list[tuple[str, str]] = []
        self.wanted: set[tuple[str, str]] = set()
        self.adapters: dict[str, FakeAdapter] = {}

    def __enter__(self) -> "FakeClient":
        self.worker = ThreadPoolExecutor(max_workers=1)
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.shutdown()

    def create(self, name: str, spec: AdapterSpec, *, init_from: Path | None = None) -> FakeAdapter:
        self.adapters[name] = FakeAdapter(self, name, spec)
        return self.adapters[name]

    def restore(self, name: str, folder: Path, *, spec: AdapterSpec | None = None):
        state = json.loads((folder / "state.json").read_text())
        if str(spec) != state["spec"]:
            raise CheckpointMismatch("spec differs")
        adapter = self.create(name, spec or AdapterSpec())
        adapter.weights, adapter.moments = np.array(state["weights"]), np.array(state["moments"])
        adapter.step = state["step"]
        return adapter, state["client"]


def fake_newest_state(parent: Path) -> Path | None:
    """The newest state that can be read."""
    states = sorted(parent.glob("step-*"), key=lambda p: int(p.name[5:]), reverse=True)
    for state in states:
        try:
            json.loads((state / "state.json").read_text())
        except (OSError, json.JSONDecodeError):
            continue
        return state
    return None
