"""These are the routes of samplers and samples."""

from functools import partial
from typing import Annotated

from fastapi import Request

from manylora.service.contract import JSON_TYPE
from manylora.service.http.context import Routes, TheCaller, check_type, json_body, takes
from manylora.service.wire.messages import CreateSamplingSessionRequest, SampleRequest
from manylora.service.wire.paths import TinkerPath, identifier
from manylora.service.wire.replies import CreateSamplingSessionReply, SamplerInfo, Submitted
from manylora.service.wire.sample_messages import read_sample

router = Routes(prefix="/api/v1", tags=["sampling"])

NewSampler = Annotated[CreateSamplingSessionRequest, json_body(CreateSamplingSessionRequest)]


@router.post("/create_sampling_session", openapi_extra=takes(CreateSamplingSessionRequest))
async def create_sampling_session(
    caller: TheCaller, message: NewSampler
) -> CreateSamplingSessionReply:
    """A sampler of a checkpoint, or of a base model."""
    path = None if message.model_path is None else TinkerPath.parse(message.model_path)
    async with caller.hub() as hub:
        sampler = await hub.samplers.create(caller.tenant, message, path)
    return CreateSamplingSessionReply(sampling_session_id=sampler)


@router.get("/samplers/{sampler_id}")
async def get_sampler(caller: TheCaller, sampler_id: str) -> SamplerInfo:
    """What a sampler samples from."""
    id = identifier(sampler_id, "sampler")
    async with caller.hub() as hub:
        return await hub.samplers.info(caller.tenant, id)


@router.post("/asample", openapi_extra=takes(SampleRequest))
async def asample(caller: TheCaller, request: Request) -> Submitted:
    """Continue a prompt, and score it."""
    check_type(request, JSON_TYPE)
    decode = partial(read_sample, limits=caller.context.settings.wire)
    submit = await caller.context.read(decode, await request.body())
    async with caller.hub() as hub:
        return await hub.samplers.sample(caller.tenant, submit)
