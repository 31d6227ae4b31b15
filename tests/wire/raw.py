"""The wire without the SDK: single requests in any order, as often as a test likes."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import numpy as np
from tinker.proto import tinker_public_pb2 as pb
from tinker.proto.response_conv import (
    deserialize_forward_backward_output,
    deserialize_sample_response,
)

from manylora.types import AdamParams, Datum
from tests.wire.server import BASE_ALIAS, DEVELOPER, Server

PROTOBUF = "application/x-protobuf"
LONG_POLL_SECONDS = 45.0  # what the SDK allows one poll


def encode(
    model_id: str,
    seq_id: int,
    data: Sequence[Datum],
    loss: str = "cross_entropy",
    *,
    config: Mapping[str, float] | None = None,
    forward_only: bool = False,
) -> bytes:
    """The body of a forward_backward request."""
    message = pb.ForwardBackwardRequest(
        model_id=model_id, seq_id=seq_id, loss_fn=loss, forward_only=forward_only
    )
    for name, value in (config or {}).items():
        message.loss_fn_config[name] = value
        message.loss_fn_config_v2[name].number = value
    for datum in data:
        entry = message.data.add()
        entry.model_input.add().encoded_text.tokens = datum.tokens.astype(np.int32).tobytes()
        for name, array in datum.loss_inputs.items():
            tensor = entry.loss_fn_inputs[name]
            tensor.dense = array.tobytes()
            tensor.dtype = pb.DTYPE_INT64 if array.dtype == np.int64 else pb.DTYPE_FLOAT32
            tensor.shape.extend(array.shape)
    return message.SerializeToString()


class RawClient:
    """One session of one tenant."""

    def __init__(self, server: Server, key: str = DEVELOPER) -> None:
        self.http = httpx.Client(
            base_url=f"{server.url}/api/v1",
            headers={"X-API-Key": key},
            timeout=LONG_POLL_SECONDS,
            trust_env=False,
        )
        self.session_id: str = ""

    def open_session(self) -> str:
        answer = self.post("create_session", tags=[], user_metadata={}, sdk_version="0.38.0")
        self.session_id = self.ok(answer)["session_id"]
        return self.session_id

    def close(self) -> None:
        if self.session_id:
            self.post(f"sessions/{self.session_id}/finish", reason={"type": "success"})
        self.http.close()

    def post(self, route: str, /, **body: Any) -> httpx.Response:
        return self.http.post(f"/{route}", json=body)

    @staticmethod
    def ok(answer: httpx.Response) -> Any:
        assert answer.status_code == 200, answer.text
        return answer.json()

    # --- submits --------------------------------------------------------------------------------

    def create_model(self, number: int = 0, rank: int = 4, seed: int = 1) -> httpx.Response:
        return self.post(
            "create_model",
            session_id=self.session_id,
            model_seq_id=number,
            base_model=BASE_ALIAS,
            lora_config={
                "rank": rank,
                "seed": seed,
                "train_unembed": True,
                "train_mlp": True,
                "train_attn": True,
            },
            optimizer_config={"type": "adamw"},
            type="create_model",
        )

    def new_model(self, number: int = 0, rank: int = 4, seed: int = 1) -> str:
        answer = self.ok(self.create_model(number, rank, seed))
        return self.result(answer["request_id"])["model_id"]

    def forward_backward(
        self, model_id: str, seq_id: int, data: Sequence[Datum], *args: Any, **options: Any
    ) -> httpx.Response:
        return self.http.post(
            "/forward_backward",
            content=encode(model_id, seq_id, data, *args, **options),
            headers={"Content-Type": PROTOBUF},
        )

    def optim_step(self, model_id: str, seq_id: int, params: AdamParams) -> httpx.Response:
        return self.post(
            "optim_step",
            model_id=model_id,
            seq_id=seq_id,
            adam_params={
                "learning_rate": params.lr,
                "beta1": params.beta1,
                "beta2": params.beta2,
                "eps": params.eps,
                "weight_decay": params.weight_decay,
                "grad_clip_norm": params.clip_norm,
            },
            type="optim_step",
        )

    def new_sampler(self, number: int = 0, **source: str) -> httpx.Response:
        return self.post(
            "create_sampling_session",
            session_id=self.session_id,
            sampling_session_seq_id=number,
            **(source or {"base_model": BASE_ALIAS}),
        )

    def sample(
        self,
        sampler: str,
        seq_id: int,
        prompt: Sequence[int],
        *,
        num_samples: int = 1,
        params: Mapping[str, Any] | None = None,
        **extra: Any,
    ) -> httpx.Response:
        return self.post(
            "asample",
            sampling_session_id=sampler,
            seq_id=seq_id,
            num_samples=num_samples,
            prompt={"chunks": [{"type": "encoded_text", "tokens": list(prompt)}]},
            sampling_params={"max_tokens": 4, "seed": 1, "temperature": 1.0, **(params or {})},
            **extra,
        )

    # --- results --------------------------------------------------------------------------------

    def poll(self, request_id: str) -> httpx.Response:
        """One long poll."""
        return self.http.post(
            "/retrieve_future",
            json={"request_id": request_id, "allow_metadata_only": False},
            headers={"Accept": PROTOBUF},
        )

    def result(self, request_id: str, seconds: float = 60.0) -> Any:
        """What came at last: protobuf as bytes, JSON (an error too) decoded."""
        end = time.monotonic() + seconds
        while True:
            answer = self.poll(request_id)
            if answer.status_code != 408:
                break
            assert time.monotonic() < end, f"{request_id} did not finish"
        assert answer.status_code == 200, answer.text
        if PROTOBUF not in answer.headers["content-type"]:
            return answer.json()
        return answer.content

    def losses(self, request_id: str) -> Any:
        """The result of a forward_backward."""
        return deserialize_forward_backward_output(self.result(request_id))

    def samples(self, request_id: str) -> Any:
        """The result of an asample."""
        return deserialize_sample_response(self.result(request_id))
