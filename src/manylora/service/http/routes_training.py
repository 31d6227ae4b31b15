"""These are the routes of models and training. All but get_info answer with a promise."""

from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any

from fastapi import Request

from manylora.service.contract import JSON_TYPE, PROTOBUF_TYPE
from manylora.service.http.context import Caller, Routes, TheCaller, check_type, json_body, takes
from manylora.service.wire.codec import adam_params
from manylora.service.wire.messages import (
    KINDS,
    CreateModelRequest,
    LoadWeightsRequest,
    ModelRequest,
    OptimizerConfig,
    OptimStepRequest,
    OrderPlace,
    SaveWeightsExternalRequest,
    SaveWeightsForSamplerRequest,
    SaveWeightsRequest,
)
from manylora.service.wire.outline import outline_of
from manylora.service.wire.paths import TinkerPath
from manylora.service.wire.replies import ModelInfo, Submitted
from manylora.types import Unsupported

router = Routes(prefix="/api/v1", tags=["training"])

_FORWARD_BACKWARD = KINDS["forward_backward"]

NewModel = Annotated[CreateModelRequest, json_body(CreateModelRequest)]
Load = Annotated[LoadWeightsRequest, json_body(LoadWeightsRequest)]
Model = Annotated[ModelRequest, json_body(ModelRequest)]
Step = Annotated[OptimStepRequest, json_body(OptimStepRequest)]
Save = Annotated[SaveWeightsRequest, json_body(SaveWeightsRequest)]
SaveForSampler = Annotated[SaveWeightsForSamplerRequest, json_body(SaveWeightsForSamplerRequest)]
SaveExternal = Annotated[SaveWeightsExternalRequest, json_body(SaveWeightsExternalRequest)]


@router.post("/create_model", openapi_extra=takes(CreateModelRequest))
async def create_model(caller: TheCaller, message: NewModel) -> Submitted:
    """A new adapter; the result is its model_id."""
    _check_optimizer(message.optimizer_config)
    if message.lora_config is None:
        raise Unsupported("training all of a model's weights is not supported; give lora_config")
    async with caller.hub() as hub:
        return await hub.training.create_model(caller.tenant, message, message.lora_config)


@router.post("/load_weights", openapi_extra=takes(LoadWeightsRequest))
async def load_weights(caller: TheCaller, message: Load) -> Submitted:
    """A checkpoint's weights, as a new model or as the first request of one just made."""
    target = message.target
    async with _using_up(caller, target if isinstance(target, OrderPlace) else None):
        path = TinkerPath.parse(message.path)
        if message.optimizer_config is not None:
            _check_optimizer(message.optimizer_config)
        if message.weights_access_token is not None:
            raise Unsupported("weights_access_token is not supported")
    async with caller.hub() as hub:
        return await hub.training.load_weights(caller.tenant, message, path)


@router.post("/get_info", openapi_extra=takes(ModelRequest))
async def get_info(caller: TheCaller, message: Model) -> ModelInfo:
    """What a model is."""
    async with caller.hub() as hub:
        return await hub.training_runs.model_info(caller.tenant, message.model_id)


@router.post(
    "/forward_backward",
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {PROTOBUF_TYPE: {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def forward_backward(caller: TheCaller, request: Request) -> Submitted:
    """Loss, log-probabilities and (unless forward_only) gradients. The body is protobuf."""
    body = await request.body()
    if request.headers.get("content-type", "").startswith(JSON_TYPE):
        raise Unsupported(
            "forward_backward in JSON is not supported; the SDK sends protobuf since 0.25.0"
        )
    check_type(request, PROTOBUF_TYPE)
    limits = caller.context.settings.wire
    async with caller.context.using_up(caller.tenant, lambda: _FORWARD_BACKWARD.peek(body)):
        outline = await caller.context.read(lambda body: outline_of(body, limits), body)
    async with caller.hub() as hub:
        return await hub.training.forward_backward(caller.tenant, outline)


@router.post("/optim_step", openapi_extra=takes(OptimStepRequest))
async def optim_step(caller: TheCaller, message: Step) -> Submitted:
    """One optimizer step on the gradients since the last one."""
    async with _using_up(caller, message.place):
        if message.optimizer_params is not None or message.adam_params is None:
            raise Unsupported("an optimizer other than adamw is not supported; give adam_params")
        adam_params(message.adam_params)  # out of range is refused now, not when its turn comes
    async with caller.hub() as hub:
        return await hub.training.submit(caller.tenant, message)


@router.post("/save_weights", openapi_extra=takes(SaveWeightsRequest))
async def save_weights(caller: TheCaller, message: Save) -> Submitted:
    """A checkpoint to train on from."""
    async with caller.hub() as hub:
        return await hub.training.submit(caller.tenant, message)


@router.post("/save_weights_for_sampler", openapi_extra=takes(SaveWeightsForSamplerRequest))
async def save_weights_for_sampler(caller: TheCaller, message: SaveForSampler) -> Submitted:
    """Frozen weights to sample from: under a name, or for one sampling session."""
    async with caller.hub() as hub:
        return await hub.training.submit(caller.tenant, message)


@router.post("/save_weights_external", openapi_extra=takes(SaveWeightsExternalRequest))
async def save_weights_external(caller: TheCaller, message: SaveExternal) -> Submitted:
    """A checkpoint in PEFT's format, to be downloaded."""
    async with _using_up(caller, message.place):
        if message.age_encryption_recipients:
            raise Unsupported("age_encryption_recipients is not supported; files are not encrypted")
    async with caller.hub() as hub:
        return await hub.training.submit(caller.tenant, message)


def _using_up(caller: Caller, place: OrderPlace | None) -> AbstractAsyncContextManager[Any]:
    return caller.context.using_up(caller.tenant, lambda: place)


def _check_optimizer(config: OptimizerConfig) -> None:
    if config.type != "adamw":
        raise Unsupported(f"optimizer {config.type!r} is not supported; there is: adamw")
